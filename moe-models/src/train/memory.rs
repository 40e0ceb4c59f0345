//! The memory of this process, as the system counts it.

use crate::{Error, Result};

/// The most memory this process has had at once, bytes, pages of mapped files among it; `None` where the system does not say.
///
/// # Source
/// `VmHWM` of Linux's `/proc/self/status`.
pub fn peak_bytes() -> Option<usize> {
    field(&std::fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

/// The memory that belongs to this process alone, bytes: not the pages of files that are mapped, which the system takes back when
/// it needs them. `None` where it does not say.
///
/// # Source
/// `RssAnon` and `RssShmem` of Linux's `/proc/self/status`.
pub fn own_bytes() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    Some(field(&status, "RssAnon:")? + field(&status, "RssShmem:").unwrap_or(0))
}

fn field(status: &str, name: &str) -> Option<usize> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Refuses to go on once this process holds more than `budget` bytes of its own.
///
/// # Errors
/// [`Error::Memory`].
pub fn check(budget: usize) -> Result<()> {
    match own_bytes() {
        Some(own) if own > budget => Err(Error::Memory { peak: own, budget }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hf::map::Bytes;

    /// The system counts whole processes, so the counts are looked at in one that runs nothing else: this program again, this test
    /// alone.
    #[test]
    fn the_peak_grows_with_what_is_used() {
        const ALONE: &str = "MOE_MEMORY_TEST_ALONE";
        if std::env::var_os(ALONE).is_some() {
            return count_alone();
        }
        let test = "train::memory::tests::the_peak_grows_with_what_is_used";
        let program = std::env::current_exe().expect("this program");
        let child = std::process::Command::new(program)
            .args(["--exact", test, "--nocapture"])
            .env(ALONE, "1")
            .output()
            .unwrap();
        let output = String::from_utf8_lossy(&child.stdout);
        assert!(child.status.success(), "{output}{}", String::from_utf8_lossy(&child.stderr));
        assert!(output.contains("1 passed"), "{test} is no longer this test's name: {output}");
    }

    fn count_alone() {
        let Some(before) = peak_bytes() else { return };
        let block = vec![1u8; 64 << 20];
        let after = peak_bytes().unwrap();
        assert!(after >= before && after >= block.len(), "{before} {after}");
        // Pages of files are nobody's alone.
        let own = own_bytes().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("block");
        std::fs::write(&path, &block).unwrap();
        let map = Bytes::map(&path).unwrap();
        assert_eq!(map.as_ref().iter().step_by(4096).map(|&byte| usize::from(byte)).sum::<usize>(), block.len() / 4096);
        assert!(own >= block.len() && own_bytes().unwrap() < own + block.len() / 2, "{own} {:?}", own_bytes());
        assert!(check(usize::MAX).is_ok());
        let message = check(1 << 20).unwrap_err().to_string();
        assert!(message.contains("budget") && message.contains("MB"), "{message}");
    }
}
