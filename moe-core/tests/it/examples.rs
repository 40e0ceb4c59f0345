//! The example runs and does what it says.

#[path = "../../examples/guest_layer.rs"]
mod guest_layer;

#[test]
fn a_guests_model_trains_around_an_moe_layer() {
    guest_layer::main().unwrap();
}
