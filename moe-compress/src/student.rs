//! [`StudentPlan`]: the shape of a student that is shallower than its teacher, and which of the teacher's layers it keeps. Pure.

use crate::{Error, Result};
use moe_models::gpt::GptConfig;
use serde::{Deserialize, Serialize};

/// Which layers a student keeps; of dense layers and of those with experts each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeptLayers {
    /// Evenly spaced, the first and the last among them.
    #[default]
    Evenly,
    /// The first ones.
    First,
    /// The last ones.
    Last,
}

/// A student's shape, and where its layers come from.
#[derive(Debug, Clone, PartialEq)]
pub struct StudentPlan {
    /// The teacher's but for the depth: the same width, and in each layer with experts as many as in the teacher's layer.
    pub config: GptConfig,
    /// Of each layer of the student, the teacher's.
    pub layers: Vec<usize>,
}

impl StudentPlan {
    /// A student of `teacher` without the share `dropped` of its layers, rounded to whole layers.
    ///
    /// Dense layers and layers with experts alternate in the student as in the teacher, so those of either kind are chosen among
    /// their own.
    ///
    /// # Errors
    /// [`Error::Argument`] if no layer would be dropped, or none kept of those with experts.
    ///
    /// # Source
    /// Paper section 4.2 and table 1: 24 layers become 21, which leaves 10 of 12 layers with experts, the pyramid's last two among
    /// them.
    pub fn new(teacher: &GptConfig, dropped: f64, kept: KeptLayers) -> Result<Self> {
        let depth = teacher.num_layers;
        let layers = (depth as f64 * (1.0 - dropped)).round();
        if !(dropped > 0.0 && dropped < 1.0) || layers < 1.0 || layers as usize == depth {
            return Err(Error::Argument(format!(
                "dropping a share of {dropped} of {depth} layers leaves {layers}; choose a share that drops at least one layer and \
                 keeps at least one"
            )));
        }
        Self::with_depth(teacher, layers as usize, kept)
    }

    /// A student of so many layers.
    ///
    /// # Errors
    /// [`Error::Argument`] if the teacher has not as many, or the student would have no layer with experts where the teacher has
    /// some.
    pub fn with_depth(teacher: &GptConfig, layers: usize, kept: KeptLayers) -> Result<Self> {
        let mut config = GptConfig { num_layers: layers, ..teacher.clone() };
        let interval = teacher.moe.as_ref().map(|moe| moe.expert_interval);
        let is_moe = |layer: usize| interval.is_some_and(|interval| (layer + 1).is_multiple_of(interval));
        let of_teacher = |experts: bool| (0..teacher.num_layers).filter(|&l| is_moe(l) == experts).collect::<Vec<_>>();
        let wanted = |experts: bool| (0..layers).filter(|&l| is_moe(l) == experts).count();
        let choose = |experts: bool| kept.choose(&of_teacher(experts), wanted(experts));
        let (Some(dense), Some(moe)) = (choose(false), choose(true)) else {
            return Err(Error::Argument(format!(
                "a student of {layers} layers has more of a kind than its teacher of {}",
                teacher.num_layers
            )));
        };
        if let Some(of_student) = &mut config.moe {
            of_student.num_experts = moe.iter().filter_map(|&layer| teacher.experts_of_layer(layer)).collect();
        }
        let (mut dense, mut moe) = (dense.into_iter(), moe.into_iter());
        let layers: Vec<usize> =
            (0..layers).filter_map(|l| if is_moe(l) { moe.next() } else { dense.next() }).collect();
        config.validate().map_err(|e| Error::Argument(format!("the student would be impossible: {e}")))?;
        Ok(Self { config, layers })
    }

    /// The teacher's name of the student's parameter `name`.
    pub fn name_in_teacher(&self, name: &str) -> Option<String> {
        const LAYERS: &str = "model.layers.";
        let Some(rest) = name.strip_prefix(LAYERS) else { return Some(name.to_owned()) };
        let (layer, rest) = rest.split_once('.')?;
        let layer = self.layers.get(layer.parse::<usize>().ok()?)?;
        Some(format!("{LAYERS}{layer}.{rest}"))
    }
}

impl KeptLayers {
    /// `count` of `layers`, in their order; `None` if there are fewer.
    fn choose(self, layers: &[usize], count: usize) -> Option<Vec<usize>> {
        let len = layers.len();
        let range = match self {
            _ if count > len => return None,
            Self::First => 0..count,
            Self::Last => len - count..len,
            Self::Evenly if count < 2 => len - count..len,
            Self::Evenly => {
                let at = |i: usize| (2 * i * (len - 1) + (count - 1)) / (2 * (count - 1));
                return Some((0..count).map(|i| layers[at(i)]).collect());
            }
        };
        Some(layers[range].to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_papers_students() {
        for name in ["350m-pr-moe-32-64", "1.3b-pr-moe-64-128"] {
            let teacher = GptConfig::preset(name).unwrap();
            let plan = StudentPlan::new(&teacher, 0.125, KeptLayers::Evenly).unwrap();
            assert_eq!(plan.config, GptConfig::preset(&format!("{name}-mos")).unwrap());
            // Layers with experts are the odd ones, counted from 0, in both.
            let odd = plan.layers.iter().enumerate().all(|(layer, of)| layer % 2 == of % 2);
            assert!(odd, "{:?}", plan.layers);
            assert_eq!((plan.layers[0], plan.layers[19], plan.layers[20]), (0, 23, 22));
        }
    }

    #[test]
    fn which_layers_are_kept() {
        let teacher = GptConfig::preset("tiny-pr-moe").unwrap();
        let layers = |count, kept| StudentPlan::with_depth(&teacher, count, kept).unwrap();
        let plan = layers(4, KeptLayers::Evenly);
        assert_eq!((plan.layers.as_slice(), plan.config.moe.unwrap().num_experts), (&[0, 1, 4, 5][..], vec![4, 8]));
        let plan = layers(4, KeptLayers::First);
        assert_eq!((plan.layers.as_slice(), plan.config.moe.unwrap().num_experts), (&[0, 1, 2, 3][..], vec![4, 8]));
        let plan = layers(4, KeptLayers::Last);
        assert_eq!((plan.layers.as_slice(), plan.config.moe.unwrap().num_experts), (&[2, 3, 4, 5][..], vec![8, 8]));
        let plan = layers(5, KeptLayers::Evenly);
        assert_eq!(plan.layers, [0, 1, 2, 5, 4]);
        assert_eq!(plan.name_in_teacher("model.layers.3.mlp.gate.weight").unwrap(), "model.layers.5.mlp.gate.weight");
        assert_eq!(plan.name_in_teacher("model.norm.weight").unwrap(), "model.norm.weight");
        assert_eq!(plan.name_in_teacher("model.layers.9.mlp.gate.weight"), None);
        let dense = GptConfig::preset("tiny-dense").unwrap();
        let plan = StudentPlan::with_depth(&dense, 3, KeptLayers::Evenly).unwrap();
        assert_eq!(plan.layers, [0, 3, 5]);
    }

    #[test]
    fn students_that_cannot_be_are_refused() {
        let teacher = GptConfig::preset("tiny-pr-moe").unwrap();
        for dropped in [0.0, 0.01, 0.99, 1.0, -1.0, f64::NAN] {
            let text = StudentPlan::new(&teacher, dropped, KeptLayers::Evenly).unwrap_err().to_string();
            assert!(text.contains("of 6 layers"), "{text}");
        }
        for (layers, part) in [(7, "more of a kind"), (1, "impossible")] {
            let text = StudentPlan::with_depth(&teacher, layers, KeptLayers::First).unwrap_err().to_string();
            assert!(text.contains(part), "{text}");
        }
    }
}
