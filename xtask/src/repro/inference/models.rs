//! The paper's models that are compared, at a fraction of their width.

use serde_json::{Value, json};

/// A model of the paper.
///
/// # Source
/// Paper table 1, by Megatron-DeepSpeed's scripts.
#[derive(Debug)]
pub(super) struct Model {
    /// Here.
    pub(super) name: &'static str,
    /// In the paper.
    pub(super) published: &'static str,
    pub(super) layers: usize,
    hidden: usize,
    /// Of the MoE layers but the last two, and of these.
    experts: Option<(usize, usize)>,
    residual: bool,
}

pub(super) const MOE: Model = Model {
    name: "MoE-128",
    published: "1.3B+MoE-128",
    layers: 24,
    hidden: 2048,
    experts: Some((128, 128)),
    residual: false,
};
pub(super) const PR_MOE: Model =
    Model { name: "PR-MoE-64/128", published: "1.3B+PR-MoE-64/128", experts: Some((64, 128)), residual: true, ..MOE };
pub(super) const MOS: Model =
    Model { name: "PR-MoE-64/128 + MoS", published: "1.3B+PR-MoE+L21+MoS", layers: 21, ..PR_MOE };
/// What has the quality of the others in the paper.
pub(super) const DENSE: Model =
    Model { name: "dense", published: "6.7B", layers: 32, hidden: 4096, experts: None, ..MOE };

pub(super) const ALL: [&Model; 4] = [&MOE, &PR_MOE, &MOS, &DENSE];

/// Columns of an attention head: a sixteenth of the paper's 128 would be too few for any kernel.
const HEAD_DIM: usize = 32;
const VOCABULARY: usize = 50_304;
const POSITIONS: usize = 256;

impl Model {
    /// Width, heads and vocabulary of the model that is `narrow` times as narrow.
    pub(super) fn sizes(&self, narrow: usize) -> [usize; 3] {
        let hidden = self.hidden / narrow;
        [hidden, (hidden / HEAD_DIM).max(1), VOCABULARY / narrow]
    }

    /// Its `config.json`.
    pub(super) fn config(&self, narrow: usize) -> Value {
        let [hidden, heads, vocabulary] = self.sizes(narrow);
        let mut config = json!({
            "architectures": ["MoeGptForCausalLM"],
            "model_type": "moe_gpt",
            "vocab_size": vocabulary,
            "max_position_embeddings": POSITIONS,
            "hidden_size": hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "intermediate_size": 4 * hidden,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-5,
            "initializer_range": 0.02,
            "tie_word_embeddings": true,
        });
        if let Some((most, last_two)) = self.experts {
            let layers = self.layers / 2;
            let counts: Vec<usize> = (0..layers).map(|l| if l + 2 < layers { most } else { last_two }).collect();
            config["moe"] = json!({
                "num_experts": counts,
                "expert_interval": 2,
                "mlp_type": if self.residual { "residual" } else { "standard" },
                "num_experts_per_tok": 1,
                "train_capacity_factor": 1.0,
                "eval_capacity_factor": 1.0,
                "min_capacity": 4,
                "use_rts": true,
                "top2_2nd_expert_sampling": true,
                "router_aux_loss_coef": 0.01,
                "router_z_loss_coef": 0.0,
            });
        }
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_but_the_width_is_the_papers() {
        let config = MOS.config(16);
        assert_eq!((&config["hidden_size"], &config["num_attention_heads"]), (&json!(128), &json!(4)));
        assert_eq!(config["vocab_size"], 3144);
        assert_eq!(config["moe"]["num_experts"], json!([64, 64, 64, 64, 64, 64, 64, 64, 128, 128]));
        assert_eq!(config["moe"]["mlp_type"], "residual");
        assert_eq!(MOE.config(16)["moe"]["num_experts"], json!(vec![128; 12]));
        let dense = DENSE.config(16);
        assert_eq!((&dense["hidden_size"], &dense["num_hidden_layers"]), (&json!(256), &json!(32)));
        assert!(dense.get("moe").is_none());
    }
}
