//! The example runs and does what it says.

#[path = "../../examples/grouped_product.rs"]
mod grouped_product;

#[test]
fn kernels_run_on_slices() {
    grouped_product::main();
}
