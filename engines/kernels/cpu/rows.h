// What a step does to one row at a time, in float32: RMSNorm, rotary embedding, SwiGLU.
#pragma once

namespace lathe {

// x / sqrt(mean(x^2) + epsilon) * weight (Zhang and Sennrich 2019, arXiv:1910.07467). output may be x.
void rms_norm_row(const float* x, const float* weight, int width, float epsilon, float* output);

// Rotate one head in place (Su et al. 2021, arXiv:2104.09864), halves side by side; cos and sin have head_dim / 2 values.
void rotate_head(float* head, const float* cos, const float* sin, int head_dim);

// silu(gate) * up (Shazeer 2020, arXiv:2002.05202); gate and up stand one after the other.
void swiglu_row(const float* gate_up, int width, float* output);

}  // namespace lathe
