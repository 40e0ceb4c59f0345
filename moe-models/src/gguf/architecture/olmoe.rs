//! `olmoe`: OLMoE.

use super::{Description, common, experts, head_dim, normalized};
use crate::fields::{Checked, Fields};
use crate::gguf::file::GgufFile;
use crate::gguf::tensors::Layout;

pub(super) fn read(fields: &mut Fields, file: &GgufFile) -> Checked<Description> {
    let mut config = common(fields, file, "olmoe")?;
    head_dim(fields, &mut config)?;
    experts(fields, &mut config, "num_experts")?;
    normalized(fields, &mut config, false)?;
    Ok(Description { config, layout: Layout::default() })
}
