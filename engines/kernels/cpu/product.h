// The products of a step's rows with a linear layer's matrices.
#pragma once

#include <vector>

#include "lathe.h"
#include "pool.h"

namespace lathe {

// The rows of one stage of a `LatheLinear`, in every form that its segments multiply with: as they are, reordered
// for bfloat16 weights, or quantized in groups. Segments that want the same form of the same features share it.
class Inputs {
   public:
    // Ready for the rows [0, num_rows) of a stage; `prepare_row` then fills each.
    void reset(const LatheLinear& linear, int stage, int num_rows);

    // Safe for different rows at once. x has the stage's features.
    void prepare_row(int row, const float* x);

    struct Form {
        int32_t kind, in_offset, in_features;
        int32_t stride;  // elements from row to row; features padded to 32 with zeros
        std::vector<float> floats;
        std::vector<int8_t> codes;
        std::vector<float> scale_TG;   // of the codes
        std::vector<int32_t> sum_TG;  // of a group's codes
    };
    const Form& form_of(const LatheSegment& segment) const;
    int num_rows() const { return num_rows_; }

   private:
    std::vector<Form> forms_;
    size_t num_forms_ = 0;
    int num_rows_ = 0;
};

// One stage, on all threads: write (or, with `add`, add) to output_TO with `stride` floats from row to row.
void multiply_stage(Pool& pool, const LatheLinear& linear, int stage, const Inputs& inputs,
                    float* middle, float* output, int output_stride, bool add);

// Buffers of a whole linear layer. `inputs` are prepared by the caller, row by row, as part of whatever made the rows.
struct LinearScratch {
    Inputs inputs;
    Inputs middle_inputs;
    std::vector<float> middle;
};

void multiply(Pool& pool, const LatheLinear& linear, LinearScratch& scratch, float* output,
              int output_stride, bool add);

// The values of INT4 or INT8 weights, rounded to bfloat16, row-major (O, I).
void dequantize(Pool& pool, const LatheSegment& segment, uint16_t* weight_OI);

}  // namespace lathe
