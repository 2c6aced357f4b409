#include "rows.h"

#include <cmath>

#include "simd.h"

namespace lathe {

void rms_norm_row(const float* x, const float* weight, int width, float epsilon, float* output) {
    f32x16 squares{};
    int i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        const f32x16 values = load_lanes(x + i);
        squares = fma(values, values, squares);
    }
    float total = sum(squares);
    for (; i < width; i++) total += x[i] * x[i];
    const float inverse = 1 / std::sqrt(total / width + epsilon);
    for (i = 0; i + kLanes <= width; i += kLanes)
        store_lanes(output + i, load_lanes(x + i) * inverse * load_lanes(weight + i));
    for (; i < width; i++) output[i] = x[i] * inverse * weight[i];
}

void rotate_head(float* head, const float* cos, const float* sin, int head_dim) {
    const int half = head_dim / 2;
    int i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        const f32x16 a = load_lanes(head + i), b = load_lanes(head + half + i);
        const f32x16 c = load_lanes(cos + i), s = load_lanes(sin + i);
        store_lanes(head + i, a * c - b * s);
        store_lanes(head + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        const float a = head[i], b = head[half + i];
        head[i] = a * cos[i] - b * sin[i];
        head[half + i] = b * cos[i] + a * sin[i];
    }
}

void swiglu_row(const float* gate_up, int width, float* output) {
    const float* up = gate_up + width;
    int i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        const f32x16 gate = load_lanes(gate_up + i);
        // e^-gate overflows below -88, where the quotient is zero in any case.
        const f32x16 negated = -maximum(gate, splat(-88.0f));
        store_lanes(output + i, gate / (1.0f + exponential(negated)) * load_lanes(up + i));
    }
    for (; i < width; i++) output[i] = gate_up[i] / (1 + std::exp(-gate_up[i])) * up[i];
}

}  // namespace lathe
