//! [`RowShare`]: rows that all ranks of a group know, of which each has a part: taking one's own part, and putting the parts
//! together. One is the other's gradient.

use crate::comm::{Collectives, Communicator, Element, Site};
use crate::exchanged::{by_dtype, exchanged, with_values};
use crate::{Error, Result};
use candle_core::{Tensor, WithDType};
use std::ops::Range;
use std::sync::Arc;

/// Which rows belong to which member of a group: every row to one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowShare {
    parts: Vec<Vec<Range<usize>>>,
    rows: usize,
}

impl RowShare {
    /// `parts[r]` are the rows of member `r`, in its order; together they are all rows.
    ///
    /// # Panics
    /// If they are not.
    pub fn new(parts: Vec<Vec<Range<usize>>>) -> Self {
        let mut all: Vec<&Range<usize>> = parts.iter().flatten().filter(|range| !range.is_empty()).collect();
        all.sort_by_key(|range| range.start);
        let rows = all.iter().fold(0, |end, range| {
            assert_eq!(range.start, end, "every row belongs to one member");
            range.end
        });
        Self { parts, rows }
    }

    /// Rows in all.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The ranges of a member, empty ones too.
    pub fn part(&self, member: usize) -> &[Range<usize>] {
        &self.parts[member]
    }

    /// Rows of a member.
    pub fn rows_of(&self, member: usize) -> usize {
        self.parts[member].iter().map(ExactSizeIterator::len).sum()
    }

    /// The rows of `member` out of all.
    fn take<T: Element>(&self, all: &[T], member: usize, width: usize) -> Vec<T> {
        self.parts[member].iter().flat_map(|range| &all[range.start * width..range.end * width]).copied().collect()
    }

    /// Every member's rows together.
    fn together<T: Element>(&self, comm: &dyn Communicator, site: Site, own: &[T], width: usize) -> Result<Vec<T>> {
        let counts: Vec<usize> = (0..self.parts.len()).map(|member| self.rows_of(member) * width).collect();
        let parts = comm.start_all_gather_v(site, own, &counts)?.wait_parts()?;
        let mut all = vec![T::ZERO; self.rows * width];
        for (ranges, part) in self.parts.iter().zip(parts) {
            let mut at = 0;
            for range in ranges {
                let to = &mut all[range.start * width..range.end * width];
                to.copy_from_slice(&part[at..at + to.len()]);
                at += to.len();
            }
        }
        Ok(all)
    }
}

/// Rows and their shape.
type Rows<T> = (Vec<T>, (usize, usize));

fn taken<T: Element + WithDType>(share: &RowShare, all: &Tensor, member: usize) -> Result<Rows<T>> {
    let width = all.dim(1)?;
    let own = with_values::<T, _>(all, |all| Ok(share.take(all, member, width)))?;
    Ok((own, (share.rows_of(member), width)))
}

fn gathered<T: Element + WithDType>(
    share: &RowShare,
    comm: &dyn Communicator,
    site: Site,
    own: &Tensor,
) -> Result<Rows<T>> {
    let width = own.dim(1)?;
    let all = with_values::<T, _>(own, |own| share.together(comm, site, own, width))?;
    Ok((all, (share.rows(), width)))
}

fn tensor<T: WithDType>((values, shape): Rows<T>, like: &Tensor) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, shape, like.device())?)
}

fn check(what: &str, tensor: &Tensor, rows: usize) -> Result<()> {
    let (got, _) = tensor.dims2()?;
    if got != rows {
        return Err(Error::Argument(format!("{what} must have {rows} rows, got {got}")));
    }
    Ok(())
}

/// This rank's rows out of all, which every member has alike. Its gradient is put together from the members' parts.
///
/// # Shapes
/// `all` `[rows, width]` to `[own rows, width]`
///
/// # Errors
/// [`Error::Argument`] for another number of rows; [`Error::Fault`] in the backward pass.
pub fn take_own(share: &Arc<RowShare>, comm: &Arc<dyn Communicator>, site: Site, all: &Tensor) -> Result<Tensor> {
    check("rows of all members", all, share.rows())?;
    let member = comm.rank();
    by_dtype!(all.dtype(), T => {
        let own = taken::<T>(share, all, member)?;
        let (share, comm, site) = (Arc::clone(share), Arc::clone(comm), site.backward());
        exchanged("take_own", all, own, move |grad| tensor(gathered::<T>(&share, &*comm, site, grad)?, grad))
    })
}

/// The rows of all members, the same on each. Its gradient, which every member has alike, is taken apart again.
///
/// # Shapes
/// `own` `[own rows, width]` to `[rows, width]`
///
/// # Errors
/// [`Error::Argument`] for another number of rows; [`Error::Fault`].
pub fn put_together(share: &Arc<RowShare>, comm: &Arc<dyn Communicator>, site: Site, own: &Tensor) -> Result<Tensor> {
    let member = comm.rank();
    check("rows of this rank", own, share.rows_of(member))?;
    by_dtype!(own.dtype(), T => {
        let all = gathered::<T>(share, &**comm, site, own)?;
        let share = Arc::clone(share);
        exchanged("put_together", own, all, move |grad| tensor(taken::<T>(&share, grad, member)?, grad))
    })
}
