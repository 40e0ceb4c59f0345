//! From the names of a model's parameters to those in published files: how several tensors there make one here, and how the
//! experts of a layer lie in one tensor there.

use super::layout::Layout;
use crate::{Error, Result};
use moe_core::ParamSpec;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// A part of a name as it is here, and what stands for it in files: one name, or several whose tensors lie one below the other
/// (along their first dimension) in the parameter.
pub type NameRule = (&'static str, &'static [&'static str]);

/// A parameter of experts that lies in files as one tensor of all experts of a layer, `[experts, ..]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StackRule {
    /// End of the parameter's name: `mlp.experts.fc_in.weight`.
    pub here: &'static str,
    /// What stands for it in files.
    pub there: &'static str,
    /// How each expert lies in the tensor.
    pub layout: Layout,
}

/// The rules of a family. None: the names are the same, experts singly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NameTable {
    rules: &'static [NameRule],
    stacks: &'static [StackRule],
}

/// Where one expert lies in the tensor of all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StackPlace {
    /// Along the first dimension.
    pub index: usize,
    /// How it lies there.
    pub layout: Layout,
}

/// A tensor in files, and which part of it is (rows of) a parameter or of one expert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilePart {
    /// Of the tensor.
    pub name: String,
    /// Of the whole tensor.
    pub shape: Vec<usize>,
    /// The expert that is meant of a stack; `None` for all of the tensor.
    pub place: Option<StackPlace>,
}

impl NameTable {
    /// Rules for names, applied in order.
    pub const fn new(rules: &'static [NameRule]) -> Self {
        Self { rules, stacks: &[] }
    }

    /// The same for a family that publishes some parameters of experts as stacks.
    #[must_use]
    pub const fn with_stacks(self, stacks: &'static [StackRule]) -> Self {
        Self { stacks, ..self }
    }

    /// Whether experts lie in stacks in this family's files.
    pub fn has_stacks(&self) -> bool {
        !self.stacks.is_empty()
    }

    /// The tensor that holds a parameter of all experts, and how each lies in it, if there is one.
    pub fn stack(&self, parameter: &str) -> Option<(String, Layout)> {
        self.stacks.iter().find_map(|rule| {
            let start = parameter.strip_suffix(rule.here)?;
            Some((format!("{start}{}", rule.there), rule.layout))
        })
    }

    /// The parts of tensors in files that make up a parameter that is no stack, or one expert of one: its rows, in their order.
    ///
    /// # Errors
    /// [`Error::Config`] if it cannot be cut so.
    pub fn parts(&self, spec: &ParamSpec, expert: Option<usize>) -> Result<Vec<FilePart>> {
        if let (Some(index), Some((name, layout))) = (expert, self.stack(&spec.name)) {
            let shape = [&spec.shape[..1], &layout.in_files(&spec.shape[1..])].concat();
            return Ok(vec![FilePart { name, shape, place: Some(StackPlace { index, layout }) }]);
        }
        let alone = expert.and_then(|index| Some((spec.expert_name(index)?, &spec.shape[1..])));
        let (name, shape) = match &alone {
            Some((name, shape)) => (Cow::Borrowed(name.as_str()), *shape),
            None => (Cow::Borrowed(spec.name.as_str()), spec.shape.as_slice()),
        };
        let whole = |(name, shape)| FilePart { name, shape, place: None };
        Ok(self.tensors(&name, shape)?.into_iter().map(whole).collect())
    }

    /// The names in files of the tensors that make up a parameter of this name, which is in no stack, experts singly.
    pub fn in_files(&self, name: &str) -> Vec<String> {
        self.rules.iter().fold(vec![name.to_owned()], |names, (here, there)| {
            let replaced = |name: String| match name.contains(here) {
                true => there.iter().map(|part| name.replacen(here, part, 1)).collect(),
                false => vec![name],
            };
            names.into_iter().flat_map(replaced).collect()
        })
    }

    /// The tensors in files that make up a parameter of this name and shape, experts singly, each with the shape it has there.
    /// Their elements follow each other in the parameter. Not for what lies in a stack.
    ///
    /// # Errors
    /// [`Error::Config`] if it cannot be cut into as many.
    pub fn tensors(&self, name: &str, shape: &[usize]) -> Result<Vec<(String, Vec<usize>)>> {
        let (names, mut shape) = (self.in_files(name), shape.to_vec());
        let count = names.len();
        match shape.first_mut() {
            Some(rows) if rows.is_multiple_of(count) => *rows /= count,
            None if count == 1 => {}
            _ => return Err(Error::Config(format!("{name} {shape:?} cannot lie in {count} equal tensors"))),
        }
        Ok(names.into_iter().map(|name| (name, shape.clone())).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_core::ParamInit;

    fn experts() -> ParamSpec {
        ParamSpec::new("fc_in.weight", &[8, 4], ParamInit::Zeros).stacked(3).below("layers.1.mlp")
    }

    #[test]
    fn rules_apply_to_experts_and_to_plain_parameters() {
        let table = NameTable::new(&[("fc_in.", &["gate_proj.", "up_proj."]), ("mlp.experts.", &["moe.experts."])]);
        let names = ["layers.1.moe.experts.2.gate_proj.weight", "layers.1.moe.experts.2.up_proj.weight"];
        let parts = table.parts(&experts(), Some(2)).unwrap();
        assert!(parts.iter().map(|part| &part.name).eq(&names));
        assert!(parts.iter().all(|part| part.shape == [4, 4] && part.place.is_none()));
        assert_eq!(table.in_files("a.fc_in.weight"), ["a.gate_proj.weight", "a.up_proj.weight"]);
        let refused = table.tensors("a.fc_in.weight", &[7, 4]).unwrap_err().to_string();
        assert!(refused.contains("a.fc_in.weight [7, 4]") && refused.contains("2 equal tensors"), "{refused}");
        assert_eq!(table.tensors("scale", &[]).unwrap(), [("scale".to_owned(), vec![])]);
        assert_eq!(NameTable::new(&[]).in_files("n"), ["n"]);
    }

    #[test]
    fn experts_are_found_in_stacks() {
        let stack = |layout| FilePart {
            name: "layers.1.moe.gate_up_proj".into(),
            shape: if layout == Layout::Rows { vec![3, 8, 4] } else { vec![3, 4, 8] },
            place: Some(StackPlace { index: 2, layout }),
        };
        const ROWS: &[StackRule] =
            &[StackRule { here: "mlp.experts.fc_in.weight", there: "moe.gate_up_proj", layout: Layout::Rows }];
        const COLUMNS: &[StackRule] = &[StackRule { layout: Layout::Columns, ..ROWS[0] }];
        for (stacks, layout) in [(ROWS, Layout::Rows), (COLUMNS, Layout::Columns)] {
            let table = NameTable::new(&[("mlp.", &["moe."])]).with_stacks(stacks);
            assert_eq!(table.parts(&experts(), Some(2)).unwrap(), [stack(layout)]);
            assert!(table.has_stacks() && table.stack("layers.1.mlp.fc_in.weight").is_none());
            assert_eq!(table.in_files("layers.1.mlp.fc_out.weight"), ["layers.1.moe.fc_out.weight"]);
        }
    }
}
