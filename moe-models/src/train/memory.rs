//! The memory of this process, as the system counts it.

use crate::{Error, Result};

/// The most memory this process has had at once, bytes; `None` where the system does not say.
///
/// # Source
/// `VmHWM` of Linux's `/proc/self/status`.
pub fn peak_bytes() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Refuses to go on once this process has had more than `budget` bytes.
///
/// # Errors
/// [`Error::Memory`].
pub fn check(budget: usize) -> Result<()> {
    match peak_bytes() {
        Some(peak) if peak > budget => Err(Error::Memory { peak, budget }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_grows_with_what_is_used() {
        let Some(before) = peak_bytes() else { return };
        let block = vec![1u8; 64 << 20];
        let after = peak_bytes().unwrap();
        assert!(after >= before && after >= block.len(), "{before} {after}");
        assert!(check(usize::MAX).is_ok());
        let message = check(1 << 20).unwrap_err().to_string();
        assert!(message.contains("budget") && message.contains("MB"), "{message}");
    }
}
