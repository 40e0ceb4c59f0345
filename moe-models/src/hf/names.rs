//! From the names of a model's parameters to those in published files, and how several tensors there make one here.

use crate::{Error, Result};
use moe_core::ParamSpec;

/// A part of a name as it is here, and what stands for it in files: one name, or several whose tensors lie one below the other
/// (along their first dimension) in the parameter.
pub type NameRule = (&'static str, &'static [&'static str]);

/// The rules of a family, applied in order. No rule: the names are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NameTable(pub &'static [NameRule]);

impl NameTable {
    /// The tensors in a file that make up a parameter, or one expert of it.
    pub fn in_files(&self, spec: &ParamSpec, expert: Option<usize>) -> Vec<String> {
        self.of(&expert.and_then(|index| spec.expert_name(index)).unwrap_or_else(|| spec.name.clone()))
    }

    /// The same of a parameter by its name, experts singly.
    fn of(&self, name: &str) -> Vec<String> {
        self.0.iter().fold(vec![name.to_owned()], |names, (here, there)| {
            let replaced = |name: String| match name.contains(here) {
                true => there.iter().map(|part| name.replacen(here, part, 1)).collect(),
                false => vec![name],
            };
            names.into_iter().flat_map(replaced).collect()
        })
    }

    /// The tensors in files that make up a parameter of this name and shape, experts singly, each with the shape it has there.
    /// Their elements follow each other in the parameter.
    ///
    /// # Errors
    /// [`Error::Config`] if it cannot be cut into as many.
    pub fn tensors(&self, name: &str, shape: &[usize]) -> Result<Vec<(String, Vec<usize>)>> {
        let (names, mut shape) = (self.of(name), shape.to_vec());
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

    #[test]
    fn rules_apply_to_experts_and_to_plain_parameters() {
        let table = NameTable(&[("fc_in.", &["gate_proj.", "up_proj."]), ("mlp.experts.", &["moe.experts."])]);
        let spec = ParamSpec::new("fc_in.weight", &[8, 4], ParamInit::Zeros);
        let experts = spec.clone().stacked(3).below("layers.1.mlp");
        let names = table.in_files(&experts, Some(2));
        assert_eq!(names, ["layers.1.moe.experts.2.gate_proj.weight", "layers.1.moe.experts.2.up_proj.weight"]);
        assert_eq!(table.in_files(&spec.below("a"), None), ["a.gate_proj.weight", "a.up_proj.weight"]);
        let shapes = table.tensors("layers.1.mlp.experts.2.fc_in.weight", &[8, 4]).unwrap();
        assert_eq!(shapes.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>(), names);
        assert!(shapes.iter().all(|(_, shape)| shape == &[4, 4]));
        let refused = table.tensors("a.fc_in.weight", &[7, 4]).unwrap_err().to_string();
        assert!(refused.contains("a.fc_in.weight [7, 4]") && refused.contains("2 equal tensors"), "{refused}");
        assert_eq!(table.tensors("scale", &[]).unwrap(), [("scale".to_owned(), vec![])]);
        assert_eq!(NameTable(&[]).in_files(&ParamSpec::new("n", &[1], ParamInit::Ones), None), ["n"]);
    }
}
