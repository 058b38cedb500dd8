// Causal attention on the CPU, forward and backward, without a T x T matrix in memory.
// defines: HeadRows, Attention, AttentionStats, attention_forward, attention_backward
//
//   out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j]     over the keys j <= i + Tk - Tq
//
// by blocks with a running maximum and sum (arXiv:2205.14135), in fp32; backward recomputes the
// weights from each row's statistics (arXiv:2307.08691, section 3.1). Which thread computes what
// changes no bit.
#pragma once

#include <cstdint>

#include "float_type.h"

namespace fastlm {

// (batch, head, row, width) with adjacent elements in a row; strides in elements.
struct HeadRows {
  void* data;
  int64_t batch, head, row;
};

struct Attention {
  int64_t B, H, H_kv;  // H is a multiple of H_kv: query head h reads key head h / (H / H_kv)
  int64_t Tq, Tk;      // 1 <= Tq <= Tk
  int64_t d;           // 1 to kMostWidth
  float scale;
  FloatType type;  // fp32, bf16 or fp16
  // (Tk, d / 2), or null: q and k are rotated by them when they are read, each pair (x[2i], x[2i +
  // 1]) by the angle of its position, dq and dk rotated back when they are written. Tq is then Tk.
  const float* cos;
  const float* sin;
  HeadRows q, k, v;
};

constexpr int64_t kMostWidth = 256;

// Of a row of x = scale * log2(e) * scores: the largest, and the sum of 2^(x - largest). Not their
// log-sum-exp, whose rounding would be an error of every weight that backward recomputes.
struct AttentionStats {
  float largest, sum;
};

// row_stats: (B, H, Tq), written. Throws std::bad_alloc before anything is, as the other one does.
void attention_forward(const Attention& a, HeadRows out, AttentionStats* row_stats);

void attention_backward(const Attention& a, HeadRows grad_out, HeadRows out,
                        const AttentionStats* row_stats, HeadRows dq, HeadRows dk, HeadRows dv);

}  // namespace fastlm
