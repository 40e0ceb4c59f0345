//! [`CpuOps`]: the same as the reference in custom operations for f32 and f64 on the CPU.

use super::linear::{add_bias, column_sums};
use super::{MoeOps, check_grouped, check_permute, check_unpermute, host};
use crate::{DROPPED, DispatchTable, Result};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Shape, Tensor};
use host::{Real, View};
use std::sync::Arc;

/// Single passes over memory with gradients of their own; one matrix product per expert.
///
/// A token's result is summed over its choices in their order, so it does not depend on the other tokens.
#[derive(Debug, Clone, Copy, Default)]
pub struct CpuOps;

impl MoeOps for CpuOps {
    fn permute(&self, tokens: &Tensor, table: &Arc<DispatchTable>) -> Result<Tensor> {
        check_permute(tokens, table)?;
        Ok(tokens.contiguous()?.apply_op1(Permute(Arc::clone(table)))?)
    }

    fn unpermute(&self, rows: &Tensor, combine_weights: &Tensor, table: &Arc<DispatchTable>) -> Result<Tensor> {
        check_unpermute(rows, combine_weights, table)?;
        Ok(rows.contiguous()?.apply_op2(&combine_weights.contiguous()?, Unpermute(Arc::clone(table)))?)
    }

    fn grouped_linear(
        &self,
        rows: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        offsets: &[usize],
    ) -> Result<Tensor> {
        check_grouped(rows, weight, bias, offsets)?;
        let op = GroupedLinear(offsets.to_vec());
        let (rows, weight) = (rows.contiguous()?, weight.contiguous()?);
        Ok(match bias {
            Some(bias) => rows.apply_op3(&weight, &bias.contiguous()?, op)?,
            None => rows.apply_op2(&weight, op)?,
        })
    }
}

fn gather_rows<T: Real>(values: &[T], width: usize, ids: &[u32]) -> Vec<T> {
    let mut out = Vec::with_capacity(ids.len() * width);
    for &id in ids {
        out.extend_from_slice(&values[id as usize * width..][..width]);
    }
    out
}

/// For each token the sum over its choices of `weight * row`; weights of 1 if `weights` is `None`.
fn sum_choices<T: Real>(rows: &[T], weights: Option<&[T]>, table: &DispatchTable, width: usize) -> Vec<T> {
    host::dispatch(|| {
        let mut out = vec![T::from_f64(0.0); table.num_tokens * width];
        let one = T::from_f64(1.0);
        for (token, into) in out.chunks_exact_mut(width.max(1)).enumerate() {
            for choice in token * table.top_k..(token + 1) * table.top_k {
                let row = table.choice_rows[choice];
                if row == DROPPED {
                    continue;
                }
                let weight = weights.map_or(one, |w| w[choice]);
                for (sum, &value) in into.iter_mut().zip(&rows[row as usize * width..][..width]) {
                    *sum += weight * value;
                }
            }
        }
        out
    })
}

struct Permute(Arc<DispatchTable>);

impl CustomOp1 for Permute {
    fn name(&self) -> &'static str {
        "moe_permute"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (_, width) = l.shape().dims2()?;
        let ids = &self.0.row_tokens;
        let out = match s.dtype() {
            DType::F64 => CpuStorage::F64(gather_rows(host::elements::<f64>(s, l)?, width, ids)),
            _ => CpuStorage::F32(gather_rows(host::elements::<f32>(s, l)?, width, ids)),
        };
        Ok((out, Shape::from((ids.len(), width))))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        fn run<T: Real>(table: &DispatchTable, x: &Tensor, grad: &Tensor) -> candle_core::Result<Tensor> {
            let width = x.dim(1)?;
            host::with_elements::<T, _>(grad, |g| {
                Tensor::from_vec(sum_choices(g, None, table, width), x.shape(), x.device())
            })
        }
        Ok(Some(if x.dtype() == DType::F64 { run::<f64>(&self.0, x, grad)? } else { run::<f32>(&self.0, x, grad)? }))
    }
}

struct Unpermute(Arc<DispatchTable>);

impl Unpermute {
    /// Gradients of the rows and of the weights.
    fn gradients<T: Real>(&self, rows: &[T], weights: &[T], grad: &[T], width: usize) -> (Vec<T>, Vec<T>) {
        host::dispatch(|| {
            let zero = T::from_f64(0.0);
            let mut d_rows = vec![zero; rows.len()];
            let mut d_weights = vec![zero; weights.len()];
            for (row, &choice) in self.0.row_choices.iter().enumerate() {
                let token_grad = &grad[choice as usize / self.0.top_k * width..][..width];
                let values = &rows[row * width..][..width];
                let weight = weights[choice as usize];
                d_weights[choice as usize] = host::sum_by(width, |i| token_grad[i] * values[i]);
                for (into, &g) in d_rows[row * width..][..width].iter_mut().zip(token_grad) {
                    *into = weight * g;
                }
            }
            (d_rows, d_weights)
        })
    }

    fn run<T: Real>(&self, rows: &Tensor, weights: &Tensor, grad: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
        let width = rows.dim(1)?;
        host::with_elements::<T, _>(rows, |r| {
            host::with_elements::<T, _>(weights, |w| {
                host::with_elements::<T, _>(grad, |g| {
                    let (d_rows, d_weights) = self.gradients(r, w, g, width);
                    Ok((
                        Tensor::from_vec(d_rows, rows.shape(), rows.device())?,
                        Tensor::from_vec(d_weights, weights.shape(), weights.device())?,
                    ))
                })
            })
        })
    }
}

impl CustomOp2 for Unpermute {
    fn name(&self) -> &'static str {
        "moe_unpermute"
    }

    fn cpu_fwd(
        &self,
        s: &CpuStorage,
        l: &Layout,
        w: &CpuStorage,
        wl: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (_, width) = l.shape().dims2()?;
        let table = &self.0;
        let out = match s.dtype() {
            DType::F64 => {
                let (rows, weights) = (host::elements::<f64>(s, l)?, host::elements::<f64>(w, wl)?);
                CpuStorage::F64(sum_choices(rows, Some(weights), table, width))
            }
            _ => {
                let (rows, weights) = (host::elements::<f32>(s, l)?, host::elements::<f32>(w, wl)?);
                CpuStorage::F32(sum_choices(rows, Some(weights), table, width))
            }
        };
        Ok((out, Shape::from((table.num_tokens, width))))
    }

    fn bwd(
        &self,
        rows: &Tensor,
        weights: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (d_rows, d_weights) = match rows.dtype() {
            DType::F64 => self.run::<f64>(rows, weights, grad)?,
            _ => self.run::<f32>(rows, weights, grad)?,
        };
        Ok((Some(d_rows), Some(d_weights)))
    }
}

/// Expert offsets; the weight is `[experts, out, in]`.
struct GroupedLinear(Vec<usize>);

impl GroupedLinear {
    fn groups(&self) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
        self.0.windows(2).enumerate().filter(|(_, p)| p[1] > p[0]).map(|(e, p)| (e, p[0], p[1] - p[0]))
    }

    fn forward<T: Real>(
        &self,
        (x, xl): (&CpuStorage, &Layout),
        (w, wl): (&CpuStorage, &Layout),
        bias: Option<&[T]>,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (num_rows, inner) = xl.shape().dims2()?;
        let (_, out, _) = wl.shape().dims3()?;
        let mut y = Vec::with_capacity(num_rows * out);
        for (expert, start, rows) in self.groups() {
            let group = View::row_major(xl.start_offset() + start * inner, rows, inner);
            let weight = View::row_major(wl.start_offset() + expert * out * inner, out, inner).transposed();
            let product = host::matmul((x, group), (w, weight))?;
            let begin = y.len();
            y.extend_from_slice(product.as_slice::<T>()?);
            if let Some(bias) = bias {
                add_bias(&mut y[begin..], &bias[expert * out..][..out]);
            }
        }
        Ok((T::to_cpu_storage_owned(y), Shape::from((num_rows, out))))
    }

    /// Gradients of rows, weight and bias. Experts without rows get zeros.
    fn gradients<T: Real>(&self, x: &Tensor, w: &Tensor, grad: &Tensor) -> candle_core::Result<[Tensor; 3]> {
        let (x, w, grad) = (x.detach(), w.detach(), grad.contiguous()?);
        let (num_rows, inner) = x.dims2()?;
        let (experts, out, _) = w.dims3()?;
        let mut dx: Vec<T> = Vec::with_capacity(num_rows * inner);
        let mut dw = vec![T::from_f64(0.0); experts * out * inner];
        let mut db = vec![T::from_f64(0.0); experts * out];
        for (expert, start, rows) in self.groups() {
            let (g, xs) = (grad.narrow(0, start, rows)?, x.narrow(0, start, rows)?);
            host::with_elements::<T, _>(&g.matmul(&w.get(expert)?)?, |v| {
                dx.extend_from_slice(v);
                Ok(())
            })?;
            host::with_elements::<T, _>(&g.t()?.matmul(&xs)?, |v| {
                dw[expert * out * inner..][..out * inner].copy_from_slice(v);
                Ok(())
            })?;
            host::with_elements::<T, _>(&g, |v| {
                db[expert * out..][..out].copy_from_slice(&column_sums(v, out));
                Ok(())
            })?;
        }
        let device = x.device();
        Ok([
            Tensor::from_vec(dx, x.shape(), device)?,
            Tensor::from_vec(dw, w.shape(), device)?,
            Tensor::from_vec(db, (experts, out), device)?,
        ])
    }

    fn backward(&self, x: &Tensor, w: &Tensor, grad: &Tensor) -> candle_core::Result<[Tensor; 3]> {
        if x.dtype() == DType::F64 { self.gradients::<f64>(x, w, grad) } else { self.gradients::<f32>(x, w, grad) }
    }
}

impl CustomOp2 for GroupedLinear {
    fn name(&self) -> &'static str {
        "grouped_linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        match x.dtype() {
            DType::F64 => self.forward::<f64>((x, xl), (w, wl), None),
            _ => self.forward::<f32>((x, xl), (w, wl), None),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let [dx, dw, _] = self.backward(x, w, grad)?;
        Ok((Some(dx), Some(dw)))
    }
}

impl CustomOp3 for GroupedLinear {
    fn name(&self) -> &'static str {
        "grouped_linear_bias"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        match x.dtype() {
            DType::F64 => self.forward::<f64>((x, xl), (w, wl), Some(host::elements(b, bl)?)),
            _ => self.forward::<f32>((x, xl), (w, wl), Some(host::elements(b, bl)?)),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dx, dw, db] = self.backward(x, w, grad)?;
        Ok((Some(dx), Some(dw), Some(db)))
    }
}
