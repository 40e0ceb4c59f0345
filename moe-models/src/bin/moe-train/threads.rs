//! Threads: workers side by side want single-threaded matrix products, everything else wants all cores.

use anyhow::{Context, Result};

/// Read by the tensor library at every matrix product.
const MATMUL_THREADS: &str = "RAYON_NUM_THREADS";

/// Sizes the thread pool, and with several workers gives each matrix product one thread, unless the user has set the
/// number. A running program cannot safely change its own environment, so it starts itself again with the setting.
pub(crate) fn set_up(workers: usize) -> Result<()> {
    if workers > 1 && std::env::var_os(MATMUL_THREADS).is_none() {
        restart_with(MATMUL_THREADS, "1")?;
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    rayon::ThreadPoolBuilder::new().num_threads(cores).build_global().context("cannot start the thread pool")
}

#[cfg(unix)]
fn restart_with(name: &str, value: &str) -> Result<()> {
    use std::os::unix::process::CommandExt;
    let program = std::env::current_exe().context("cannot find this program's file")?;
    // Replaces this process, so it returns only if that fails.
    let error = std::process::Command::new(program).args(std::env::args_os().skip(1)).env(name, value).exec();
    Err(error).with_context(|| format!("cannot start again with {name}={value}; set it yourself"))
}

#[cfg(not(unix))]
fn restart_with(name: &str, value: &str) -> Result<()> {
    eprintln!("set {name}={value} for full speed with several workers");
    Ok(())
}
