//! From the names of a model's parameters to those in published files, and how several tensors there make one here.

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
        let own = expert.and_then(|index| spec.expert_name(index)).unwrap_or_else(|| spec.name.clone());
        self.0.iter().fold(vec![own], |names, (here, there)| {
            let replaced = |name: String| match name.contains(here) {
                true => there.iter().map(|part| name.replacen(here, part, 1)).collect(),
                false => vec![name],
            };
            names.into_iter().flat_map(replaced).collect()
        })
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
        assert_eq!(NameTable(&[]).in_files(&ParamSpec::new("n", &[1], ParamInit::Ones), None), ["n"]);
    }
}
