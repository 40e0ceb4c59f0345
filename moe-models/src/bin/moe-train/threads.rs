//! Threads and memory: workers side by side want single-threaded matrix products, everything else wants all cores; and a
//! step frees the large buffers that the next one asks for again.

use anyhow::{Context, Result};

/// The system allocator returns such buffers to the kernel each time: a fifth of a step went into page faults
/// (2026-11-23, `perf record`, 2 cores: 3,900 tokens/s with it, 5,000 with this one keeping them).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What the program wants of its environment, unless the user has set it.
const KEEP_FREED_MEMORY: (&str, &str) = ("MIMALLOC_PURGE_DELAY", "-1");
/// Read by the tensor library at every matrix product.
const ONE_MATMUL_THREAD: (&str, &str) = ("RAYON_NUM_THREADS", "1");

/// Sizes the thread pool; with several workers gives each matrix product one thread.
///
/// Both settings are read from the environment before `main`, and a running program cannot safely change its own, so it
/// starts itself again with them.
pub(crate) fn set_up(workers: usize) -> Result<()> {
    let mut wanted = vec![KEEP_FREED_MEMORY];
    if workers > 1 {
        wanted.push(ONE_MATMUL_THREAD);
    }
    wanted.retain(|(name, _)| std::env::var_os(name).is_none());
    if !wanted.is_empty() {
        restart_with(&wanted)?;
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    rayon::ThreadPoolBuilder::new().num_threads(cores).build_global().context("cannot start the thread pool")
}

#[cfg(unix)]
fn restart_with(variables: &[(&str, &str)]) -> Result<()> {
    use std::os::unix::process::CommandExt;
    let program = std::env::current_exe().context("cannot find this program's file")?;
    let mut command = std::process::Command::new(program);
    command.args(std::env::args_os().skip(1)).envs(variables.iter().copied());
    // Replaces this process, so it returns only if that fails.
    Err(command.exec()).with_context(|| format!("cannot start again with {variables:?}; set them yourself"))
}

#[cfg(not(unix))]
fn restart_with(variables: &[(&str, &str)]) -> Result<()> {
    eprintln!("for full speed set {variables:?}");
    Ok(())
}
