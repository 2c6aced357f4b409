// Products on AMX, of 16 or 32 rows with 32 outputs at a time.
//
// Dense weights lie in memory as one B after the other (`LATHE_BF16_TILES`). A product of 16 rows is done before the weights
// of the next have come from memory, so one path serves a decode step of one row and a prefill of thousands.
// Quantized weights lie so that their bytes, or halves of bytes, are lines of B (see vector_product.cpp). Rows are the
// INT8 ones of the vector units, which are faster for few rows: sums of integers are exact in any order, so the
// two differ in no bit.
//
// In either a row's sums do not depend on the rows beside it: they are the same bits in a step and in a prefill.
#include "product_kernels.h"

#include "amx.h"

#if LATHE_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lathe {

#if LATHE_AMX

namespace {

template <bool kTwoBlocks>
void dense_blocks(const Work& work, int row, const uint16_t* unit_0, const uint16_t* unit_1, int depth) {
    const size_t block_size = size_t(work.form.stride) * kLanes;
    const uint16_t* block_0 = work.form.bf16.data() + row / kLanes * block_size;
    const uint16_t* block_1 = block_0 + block_size;
    tile_zero<0>(), tile_zero<1>();
    if (kTwoBlocks) tile_zero<2>(), tile_zero<3>();
    for (int k = 0; k < depth; k++) {
        tile_load<4>(block_0 + k * kTile, 64);
        tile_load<6>(unit_0 + k * kTile, 64);
        multiply_bf16<0, 4, 6>();
        tile_load<7>(unit_1 + k * kTile, 64);
        multiply_bf16<1, 4, 7>();
        if (!kTwoBlocks) continue;
        tile_load<5>(block_1 + k * kTile, 64);
        multiply_bf16<2, 5, 6>();
        multiply_bf16<3, 5, 7>();
    }
    alignas(64) float products[4][kLanes][kLanes];
    tile_store<0>(products[0]), tile_store<1>(products[1]);
    if (kTwoBlocks) tile_store<2>(products[2]), tile_store<3>(products[3]);
    const int count = std::min((kTwoBlocks ? 2 : 1) * kLanes, work.row_end - row);
    const int num_units = ceil_div(work.num_outputs(), kLanes);
    for (int r = 0; r < count; r++)
        for (int unit = 0; unit < num_units; unit++)
            write_lanes(work, row + r, work.output + unit * kLanes,
                        load_lanes(products[r / kLanes * 2 + unit][r % kLanes]));
}

void dense(const Work& work, Tiles& tiles) {
    const int depth = ceil_div(work.segment.in_features, kDepth);
    const size_t unit_size = size_t(depth) * kTile;
    const auto* unit_0 =
        static_cast<const uint16_t*>(work.segment.weight) + work.output / kLanes * unit_size;
    const uint16_t* unit_1 = work.num_outputs() > kLanes ? unit_0 + unit_size : unit_0;
    tiles.configure(std::min(work.row_end - work.row, kLanes), 64);
    for (int row = work.row; row < work.row_end; row += 2 * kLanes)
        row + kLanes < work.row_end ? dense_blocks<true>(work, row, unit_0, unit_1, depth)
                                    : dense_blocks<false>(work, row, unit_0, unit_1, depth);
}

constexpr int kPart = kRowGroup * kLanes;  // bytes of B that share a scale on both sides

// Sixteen outputs' codes without their shift, as lines of B.
template <bool kInt4>
void unpack(const LatheSegment& segment, int unit, int8_t* to) {
    const int loads_per_group = segment.group_size / (kInt4 ? 8 : 4);
    const int num_groups = segment.in_features / segment.group_size;
    const auto* from =
        static_cast<const uint8_t*>(segment.weight) + size_t(unit) * num_groups * loads_per_group * 64;
    for (int group = 0; group < num_groups; group++) {
        i32x16 lanes = i32x16{} + (kInt4 ? 8 : 128);
        if (segment.zero_point)
            lanes += widen(load<i8x16>(segment.zero_point + (size_t(unit) * num_groups + group) * kLanes));
        const u8x64 shift = (u8x64)((u32x16)lanes * 0x01010101u);
        for (int j = 0; j < loads_per_group; j++, from += 64, to += kInt4 ? 128 : 64) {
            const u8x64 bytes = load<u8x64>(from);
            if (kInt4) {
                store(to, (bytes & 15) - shift);
                store(to + 64, ((u8x64)((u16x32)bytes >> 4) & 15) - shift);
            } else {
                store(to, bytes - shift);
            }
        }
    }
}

// Adds a stored C, times the scales of its outputs and rows.
LATHE_INLINE void add_scaled(const int32_t (*dots)[kLanes], f32x16 weight_scale, const float* row_scale,
                             int groups, int num_rows, float (*sums)[kLanes]) {
    for (int r = 0; r < num_rows; r++) {
        const f32x16 dot = __builtin_convertvector(load<i32x16>(dots[r]), f32x16);
        store_lanes(sums[r], fma(dot, weight_scale * row_scale[r * groups], load_lanes(sums[r])));
    }
}

template <class Scale>
LATHE_INLINE void quantized_blocks(const Work& work, int row, const int8_t* unit_0, const int8_t* unit_1) {
    const LatheSegment& segment = work.segment;
    const int parts = segment.in_features / kRowGroup, stride = work.form.stride;
    const int groups = segment.in_features / segment.group_size, parts_per_group = parts / groups;
    const int8_t* block_0 = work.form.codes.data() + size_t(row) * stride;
    const float* row_scale = work.form.scale_TG.data() + size_t(row) * parts;
    const int unit = work.output / kLanes, num_units = ceil_div(work.num_outputs(), kLanes);
    const auto* scale = static_cast<const Scale*>(segment.scale) + size_t(unit) * groups * kLanes;
    const Scale* scale_1 = num_units > 1 ? scale + size_t(groups) * kLanes : scale;
    const int count_0 = std::min(kLanes, work.row_end - row);
    const int count_1 = std::min(kLanes, work.row_end - row - kLanes);
    alignas(64) int32_t dots[4][kLanes][kLanes];
    alignas(64) float sums[4][kLanes][kLanes] = {};
    for (int part = 0; part < parts; part++) {
        const size_t at = size_t(part / parts_per_group) * kLanes;
        const f32x16 weight_scale_0 = load_lanes(scale + at), weight_scale_1 = load_lanes(scale_1 + at);
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
        tile_load<4>(block_0 + part * kRowGroup, stride);
        tile_load<6>(unit_0 + part * kPart, 64);
        multiply_int8<0, 4, 6>();
        tile_load<7>(unit_1 + part * kPart, 64);
        multiply_int8<1, 4, 7>();
        if (count_1 > 0) {
            tile_load<5>(block_0 + kLanes * stride + part * kRowGroup, stride);
            multiply_int8<2, 5, 6>();
            multiply_int8<3, 5, 7>();
        }
        tile_store<0>(dots[0]);
        add_scaled(dots[0], weight_scale_0, row_scale + part, parts, count_0, sums[0]);
        tile_store<1>(dots[1]);
        add_scaled(dots[1], weight_scale_1, row_scale + part, parts, count_0, sums[1]);
        if (count_1 <= 0) continue;
        const float* row_scale_1 = row_scale + kLanes * parts + part;
        tile_store<2>(dots[2]);
        add_scaled(dots[2], weight_scale_0, row_scale_1, parts, count_1, sums[2]);
        tile_store<3>(dots[3]);
        add_scaled(dots[3], weight_scale_1, row_scale_1, parts, count_1, sums[3]);
    }
    for (int r = 0; r < count_0 + std::max(count_1, 0); r++)
        for (int u = 0; u < num_units; u++)
            write_lanes(work, row + r, work.output + u * kLanes,
                        load_lanes(sums[r / kLanes * 2 + u][r % kLanes]));
}

void quantized(const Work& work, Tiles& tiles) {
    const LatheSegment& segment = work.segment;
    thread_local Buffer<int8_t> buffer;
    const size_t unit_size = size_t(segment.in_features) * kLanes;
    const int num_units = ceil_div(work.num_outputs(), kLanes);
    int8_t* unpacked = grown(buffer, 2 * unit_size);
    for (int u = 0; u < num_units; u++)
        segment.kind == LATHE_INT4 ? unpack<true>(segment, work.output / kLanes + u, unpacked + u * unit_size)
                                   : unpack<false>(segment, work.output / kLanes + u, unpacked + u * unit_size);
    tiles.configure(kLanes, kRowGroup);
    for (int row = work.row; row < work.row_end; row += 2 * kLanes)
        segment.scale_is_fp32 ? quantized_blocks<float>(work, row, unpacked, unpacked + unit_size)
                              : quantized_blocks<uint16_t>(work, row, unpacked, unpacked + unit_size);
}

// Linux lets a process use tiles once it has asked.
bool ask_for_tiles() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool has_amx() {
    static const bool granted = ask_for_tiles();
    return granted;
}

void multiply_with_amx(const Work& work, Tiles& tiles) {
    is_quantized(work.segment.kind) ? quantized(work, tiles) : dense(work, tiles);
}

void round_for_amx(const float* x, int num_features, uint16_t* to) {
    for (int i = 0; i < num_features; i += kDepth, to += kTile) {
        float last[kDepth] = {};
        const bool is_whole = i + kDepth <= num_features;
        if (!is_whole) std::copy(x + i, x + num_features, last);
        const float* from = is_whole ? x + i : last;
        store(to, pack_bf16(load_lanes(from), load_lanes(from + kLanes)));
    }
}

#else

bool has_amx() {
    return false;
}

void multiply_with_amx(const Work&, Tiles&) {
    __builtin_unreachable();
}

void round_for_amx(const float*, int, uint16_t*) {
    __builtin_unreachable();
}

#endif

}  // namespace lathe
