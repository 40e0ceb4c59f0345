//! The example runs and does what it says.

#[path = "../../examples/ask.rs"]
mod ask;

#[test]
fn a_model_folder_is_loaded_and_asked() {
    ask::main().unwrap();
}
