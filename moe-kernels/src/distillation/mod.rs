//! Cross-entropy plus the divergence from a teacher, fused with both output layers: logits of student and teacher exist for one
//! block of tokens at a time.
//!
//! Everything a token's loss and gradient need of the other parts of a vocabulary are a few sums, exchanged once per block of tokens
//! as for the cross-entropy alone ([`crate::cross_entropy::linear_cross_entropy_part`]); the cross-entropy has the same bits as there.

#[cfg(test)]
mod tests;

use crate::attention::row_max;
use crate::buffer::with_scratch_f32;
use crate::custom::{self, with_inputs};
use crate::gemm::{Operand, PackedWeights};
use crate::output_loss::{BLOCK, Computed, Gradients, OutputLayer, for_rows, packed_both_ways, product};
use crate::packed::{PackedMatrices, only_float};
use crate::parallel::SharedMut;
use crate::select::vectorize;
use crate::{Isa, Precision, Result, select};
use moe_core::ops::host::{self, Real};
use moe_core::ops::{Distillation, DistilledLoss, IGNORED, PartStatistics, SoftTargets, StudentOutput};
use moe_core::tape;
use std::ops::Range;

const NAME: &str = "linear_distillation";

/// Mean over the counted targets of the cross-entropy and of `T^2 KL(teacher || student)`; see
/// [`moe_core::ops::LossOps::linear_distillation`]. The student's weight is a tensor, with its gradient; the teacher's may be packed.
///
/// # Errors
/// If sizes do not fit, a target or an entry is outside the vocabulary, or the student's weight is packed; what the exchange between
/// parts returns.
pub fn linear_distillation(
    student: StudentOutput<'_>,
    soft: SoftTargets<'_>,
    how: Distillation,
    precision: Precision,
) -> Result<DistilledLoss> {
    how.validate()?;
    student.check(&soft)?;
    let isa = select::current();
    let (hidden, weight) = (student.hidden, student.weight.tensor()?);
    let wants_gradients = tape::tracks(&[hidden, weight]);
    let run = |teacher: Teacher<'_>| -> Result<DistilledLoss> {
        let loss = LinearDistillation { student, teacher, how, isa, wants_gradients };
        let (sums, gradients) = with_inputs(NAME, &[hidden, weight], |inputs| {
            let (hidden, weight) = (inputs[0], inputs[1]);
            let sizes = [weight.rows(), weight.width()];
            let (forward, backward) = packed_both_ways(isa, precision, weight.values, sizes, wants_gradients);
            loss.run(OutputLayer {
                isa,
                precision,
                hidden: hidden.values,
                forward: &forward,
                backward: backward.as_ref(),
            })
        })??;
        let [cross_entropy, kd] = sums;
        let loss = Computed::new(NAME, cross_entropy as f32 + kd as f32, gradients, isa);
        Ok(DistilledLoss { loss: custom::apply(loss, &[hidden, weight])?, cross_entropy, kd })
    };
    match soft {
        SoftTargets::TopK { k, ids, probs } => run(Teacher::TopK { k, ids, probs }),
        SoftTargets::Layer { hidden, weight } => match PackedMatrices::of(weight)? {
            Some(packed) => {
                let matrices = packed.matrices();
                let weight = only_float(&matrices)?;
                with_inputs(NAME, &[hidden], |of| run(Teacher::Layer { hidden: of[0].values, weight }))?
            }
            None => with_inputs(NAME, &[hidden, weight.tensor()?], |of| {
                let sizes = [of[1].rows(), of[1].width()];
                let (weight, _) = packed_both_ways(isa, precision, of[1].values, sizes, false);
                run(Teacher::Layer { hidden: of[0].values, weight: &weight })
            })?,
        },
    }
}

/// What the teacher says, as numbers.
#[derive(Clone, Copy)]
enum Teacher<'a> {
    Layer { hidden: &'a [f32], weight: &'a PackedWeights },
    TopK { k: usize, ids: &'a [u32], probs: &'a [f32] },
}

struct LinearDistillation<'a> {
    student: StudentOutput<'a>,
    teacher: Teacher<'a>,
    how: Distillation,
    isa: Isa,
    wants_gradients: bool,
}

/// What the entries that are here say of a token; over the parts of a vocabulary each is merged by itself.
#[derive(Clone, Copy, Default)]
struct RowStatistics {
    /// Of the student's logits, with the target's.
    plain: Option<PartStatistics>,
    /// Of its logits at the loss's temperature.
    tempered: Option<PartStatistics>,
    /// Of the teacher's logits at that temperature; or of those of the student's that share what the teacher leaves, and as
    /// `target` the named entries' `sum p (ln p - z)`.
    teacher: Option<PartStatistics>,
    /// The teacher's exponentials times the distances of its logits from the student's.
    distance: Option<PartStatistics>,
}

impl RowStatistics {
    /// In a fixed order; those that a kind of teacher does not have are left out.
    fn all(&self) -> impl Iterator<Item = PartStatistics> {
        [self.plain, self.tempered, self.teacher, self.distance].into_iter().flatten()
    }

    /// As many as `self` has, from `words`.
    fn like(&self, words: &mut impl Iterator<Item = PartStatistics>) -> Self {
        let mut next = |own: Option<PartStatistics>| own.and_then(|_| words.next());
        Self {
            plain: next(self.plain),
            tempered: next(self.tempered),
            teacher: next(self.teacher),
            distance: next(self.distance),
        }
    }
}

impl LinearDistillation<'_> {
    /// Means of cross-entropy and scaled divergence, and the gradients of their sum.
    fn run(&self, layer: OutputLayer<'_>) -> Result<([f64; 2], Gradients)> {
        let [vocab, _] = layer.forward.shape();
        let targets = self.student.targets;
        let mut losses = vec![[0.0; 2]; targets.len()];
        let room = match self.teacher {
            Teacher::Layer { .. } => BLOCK.min(targets.len()) * vocab,
            Teacher::TopK { .. } => 0,
        };
        let gradients = with_scratch_f32(room, |scratch| {
            layer.each_block(targets.len(), |tokens, logits| {
                let teacher = self.teacher_logits(tokens.clone(), scratch);
                self.block(tokens.clone(), logits, teacher, &mut losses[tokens])
            })
        })?;
        let counted = self.counted();
        let mean = |part: usize| losses.iter().map(|loss| loss[part]).sum::<f64>() / counted;
        Ok(([mean(0), self.how.factor() * mean(1)], gradients))
    }

    fn counted(&self) -> f64 {
        self.student.targets.iter().filter(|&&t| t != IGNORED).count().max(1) as f64
    }

    /// The teacher's logits of these tokens, if it has any.
    fn teacher_logits<'b>(&self, tokens: Range<usize>, scratch: &'b mut [f32]) -> &'b mut [f32] {
        let Teacher::Layer { hidden, weight } = self.teacher else { return &mut [] };
        let [vocab, width] = weight.shape();
        let rows = tokens.len();
        let block = &hidden[tokens.start * width..][..rows * width];
        let logits = &mut scratch[..rows * vocab];
        product(self.isa, Operand::rows(block, rows, width, width), weight, logits);
        logits
    }

    /// The losses of a block; its logits become their gradients if these are wanted.
    fn block(
        &self,
        tokens: Range<usize>,
        logits: &mut [f32],
        teacher: &mut [f32],
        losses: &mut [[f64; 2]],
    ) -> Result<()> {
        let rows = tokens.len();
        let vocab = logits.len() / rows.max(1);
        let of_teacher = teacher.len() / rows.max(1);
        let teacher = SharedMut::new(teacher);
        // SAFETY: it is called below with the rows that `for_rows` gives, each of which belongs to one task.
        let teacher_row = |row: usize| unsafe { teacher.slice(row * of_teacher, of_teacher) };
        let mut own = vec![RowStatistics::default(); rows];
        for_rows(logits, vocab, &mut own, |row, logits, own| {
            *own = self.statistics(tokens.start + row, logits, teacher_row(row));
        });
        let all = match self.student.part {
            None => own.clone(),
            Some(_) => {
                let words = own.iter().flat_map(RowStatistics::all).collect();
                let mut merged = self.student.merged(words)?.into_iter();
                own.iter().map(|own| own.like(&mut merged)).collect()
            }
        };
        for_rows(logits, vocab, losses, |row, logits, losses| {
            let token = tokens.start + row;
            *losses = self.losses(token, &all[row]);
            if self.wants_gradients {
                self.gradient(token, logits, teacher_row(row), [&own[row], &all[row]]);
            }
        });
        Ok(())
    }

    /// Of a row of logits, which stay; the teacher's become exponentials.
    fn statistics(&self, token: usize, logits: &[f32], teacher: &mut [f32]) -> RowStatistics {
        let target = self.student.targets[token];
        if target == IGNORED {
            // As many as of any other token: the parts of a vocabulary send the same.
            let none = Some(PartStatistics::IGNORED);
            let distance = none.filter(|_| matches!(self.teacher, Teacher::Layer { .. }));
            return RowStatistics { plain: none, tempered: none, teacher: none, distance };
        }
        let heat = 1.0 / self.how.temperature as f32;
        let (max, plain) =
            vectorize!(self.isa, (logits: &[f32]) -> (f32, f32) { (row_max(logits), exp_sum(logits, 1.0)) });
        let tempered = match self.how.temperature {
            1.0 => plain,
            _ => vectorize!(self.isa, (logits: &[f32], heat: f32) -> f32 { exp_sum(logits, heat) }),
        };
        let of = |max: f64, sum: f32, target: f64| Some(PartStatistics { max, sum: sum.into(), target });
        let hot_max = f64::from(max * heat);
        let z = self.student.local(target).map_or(0.0, |at| f64::from(logits[at]));
        let (teacher, distance) = match self.teacher {
            Teacher::Layer { .. } => {
                let (of_teacher, sum, distance) = vectorize!(self.isa, (logits: &[f32], teacher: &mut [f32], max: f32, heat: f32) -> (f32, f32, f32) {
                    follow(logits, teacher, max, heat)
                });
                let hot = f64::from(of_teacher * heat);
                let apart = if logits.is_empty() { 0.0 } else { hot - hot_max };
                let moved = f64::from(distance) + f64::from(sum) * apart;
                let distance = PartStatistics { max: hot, sum: moved, target: 0.0 };
                (of(hot, sum, 0.0), Some(distance))
            }
            Teacher::TopK { .. } => {
                let named: f64 = self.named(token).map(|(at, p)| entropy_term(p, f64::from(logits[at] * heat))).sum();
                (of(hot_max, self.rest_sum(token, logits, max, heat), named), None)
            }
        };
        RowStatistics { plain: of(max.into(), plain, z), tempered: of(hot_max, tempered, 0.0), teacher, distance }
    }

    /// The entries that the teacher names for a token and that are here, with their probabilities.
    fn named(&self, token: usize) -> impl Iterator<Item = (usize, f32)> {
        let (k, ids, probs) = match self.teacher {
            Teacher::TopK { k, ids, probs } => (k, ids, probs),
            Teacher::Layer { .. } => (0, &[][..], &[][..]),
        };
        let of = token * k..(token + 1) * k;
        let pairs = ids[of.clone()].iter().zip(&probs[of]);
        pairs.filter_map(|(&id, &p)| Some((self.student.local(id)?, p)))
    }

    /// Of the entries that are here and not named. By itself, for it may be far smaller than the whole sum.
    fn rest_sum(&self, token: usize, logits: &[f32], max: f32, heat: f32) -> f32 {
        with_scratch_f32(logits.len(), |rest| {
            rest.copy_from_slice(logits);
            self.named(token).for_each(|(at, _)| rest[at] = f32::NEG_INFINITY);
            vectorize!(self.isa, (rest: &[f32], max: f32, heat: f32) -> f32 {
                host::sum_by(rest.len(), |i| ((rest[i] - max) * heat).exp_())
            })
        })
    }

    /// Cross-entropy and divergence of a token.
    fn losses(&self, token: usize, all: &RowStatistics) -> [f64; 2] {
        let (Some(plain), Some(tempered), Some(teacher)) = (all.plain, all.tempered, all.teacher) else {
            return [0.0; 2];
        };
        if self.student.targets[token] == IGNORED {
            return [0.0; 2];
        }
        let cross_entropy = f64::from(plain.max as f32 - plain.target as f32) + plain.sum.ln();
        let ln_sum = |of: PartStatistics| of.max + of.sum.ln();
        let kd = match (self.teacher, all.distance) {
            (Teacher::Layer { .. }, Some(distance)) => {
                let mean = distance.sum / teacher.sum * (distance.max - teacher.max).exp();
                mean - ln_sum(teacher) + ln_sum(tempered)
            }
            _ => teacher.target + entropy_term(self.rest(token), ln_sum(teacher)) + ln_sum(tempered),
        };
        [cross_entropy, kd]
    }

    /// What the teacher leaves to entries that it does not name.
    fn rest(&self, token: usize) -> f32 {
        match self.teacher {
            Teacher::TopK { k, probs, .. } => self.student.rest(&probs[token * k..(token + 1) * k]) as f32,
            Teacher::Layer { .. } => 0.0,
        }
    }

    /// Turns a row of logits into the gradient of the mean loss.
    fn gradient(&self, token: usize, logits: &mut [f32], teacher: &[f32], [own, all]: [&RowStatistics; 2]) {
        let target = self.student.targets[token];
        if target == IGNORED {
            logits.fill(0.0);
            return;
        }
        let pairs = (own.plain.zip(all.plain), own.tempered.zip(all.tempered), own.teacher.zip(all.teacher));
        let (Some(plain), Some(tempered), Some(of_teacher)) = pairs else { return };
        let scale = 1.0 / self.counted() as f32;
        let Distillation { weight, temperature } = self.how;
        let followed = scale * (weight * temperature) as f32;
        let heat = 1.0 / temperature as f32;
        let max = plain.0.max as f32;
        // The exponent is 0 where all is here, and the factor what it is without parts.
        let share = |(own, all): (PartStatistics, PartStatistics)| (own.max - all.max).exp() as f32 / all.sum as f32;
        let (a, b) = (share(plain) * scale, share(tempered) * followed);
        match self.teacher {
            Teacher::Layer { .. } => {
                let c = share(of_teacher) * followed;
                vectorize!(self.isa, (logits: &mut [f32], teacher: &[f32], max: f32, heat: f32, a: f32, b: f32, c: f32) {
                    if heat == 1.0 {
                        for (z, p) in logits.iter_mut().zip(teacher) {
                            *z = (*z - max).exp_() * (a + b) - p * c;
                        }
                    } else {
                        for (z, p) in logits.iter_mut().zip(teacher) {
                            let moved = *z - max;
                            *z = moved.exp_() * a + (moved * heat).exp_() * b - p * c;
                        }
                    }
                });
            }
            Teacher::TopK { .. } => {
                // Entries that are not named share what is left as the student does; the named ones are put right after.
                let rest = self.rest(token);
                let c = if rest > 0.0 { share(of_teacher) * followed * rest } else { 0.0 };
                let named: Vec<(usize, f32, f32)> = self.named(token).map(|(at, p)| (at, p, logits[at])).collect();
                vectorize!(self.isa, (logits: &mut [f32], max: f32, heat: f32, a: f32, b: f32, c: f32) {
                    for z in logits.iter_mut() {
                        let moved = *z - max;
                        *z = moved.exp_() * a + (moved * heat).exp_() * (b - c);
                    }
                });
                for (at, p, z) in named {
                    logits[at] = (z - max).exp() * a + ((z - max) * heat).exp() * b - p * followed;
                }
            }
        }
        if let Some(at) = self.student.local(target) {
            logits[at] -= scale;
        }
    }
}

/// `p (ln p - z)`, which is 0 at `p = 0`.
fn entropy_term(p: f32, z: f64) -> f64 {
    let p = f64::from(p);
    if p > 0.0 { p * (p.ln() - z) } else { 0.0 }
}

/// Sum of the exponentials of the distances from the maximum, times `heat`.
#[inline(always)]
fn exp_sum(row: &[f32], heat: f32) -> f32 {
    let max = row_max(row);
    host::sum_by(row.len(), |i| ((row[i] - max) * heat).exp_())
}

/// Replaces the teacher's logits by exponentials of their distances from their maximum times `heat`; returns the maximum, their sum,
/// and their sum times the distances of both rows from each other, each counted from its own maximum.
#[inline(always)]
fn follow(logits: &[f32], teacher: &mut [f32], max: f32, heat: f32) -> (f32, f32, f32) {
    let of_teacher = row_max(teacher);
    let len = logits.len().min(teacher.len());
    let (logits, teacher) = (&logits[..len], &mut teacher[..len]);
    let distance = {
        let teacher = &*teacher;
        host::sum_by(len, |i| {
            let t = (teacher[i] - of_teacher) * heat;
            t.exp_() * (t - (logits[i] - max) * heat)
        })
    };
    teacher.iter_mut().for_each(|t| *t = ((*t - of_teacher) * heat).exp_());
    (of_teacher, host::sum_by(len, |i| teacher[i]), distance)
}
