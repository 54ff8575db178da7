/* Kernels: the arithmetic of the CPU twin, and nothing else.
 *
 * In: pointers, sizes and strides in elements.  Out: numbers in the caller's memory.
 * No Python, no OpenMP, no allocation in here: Cython owns the loops and the memory, Python the decisions.
 * kernels.inc is the list; README.md has the formulas.
 */
#ifndef CCONV_KERNELS_H
#define CCONV_KERNELS_H

#include <stddef.h>
#include <stdint.h>

/* One phase of the channels of an input tile, which lie `plane` elements apart: `height` x `width` elements each, those
 * outside the image are zeros. Row i comes from source row `top + i * row_step`, column j from
 * `left + j * column_step`; strides are in bytes, because NumPy's are. With `pair`, a second phase that begins one
 * column to the right follows so many elements behind the first. `after` the last row so many zeros follow. */
typedef struct {
    long channels, plane, height, width, pitch, pair, after;
    long top, left, row_step, column_step;
    long source_height, source_width;
    ptrdiff_t channel_stride, row_stride, column_stride;
} cconv_rows;

/* Where rows of pixels are read as one run, the gaps between them included, and written without: pixel i of all rows
 * lies at[i] pixels into the run, and before[v] pixels come before its vector v. Both tables know what comes behind the
 * last: a vector of pixels, and a vector. */
typedef struct {
    const int32_t *at, *before;
} cconv_gaps;

/* Order of planning.specs.ACTIVATIONS; 0 is none. */
enum cconv_activation {
    CCONV_NONE,
    CCONV_RELU,
    CCONV_RELU6,
    CCONV_LEAKY_RELU,
    CCONV_SIGMOID,
    CCONV_SILU,
    CCONV_HARDSWISH,
    CCONV_TANH,
    CCONV_GELU
};

/* `past`: the result is too large to be found in a cache by whoever reads it, so that whole lines of it go past them.
 * Not with a residual. */
typedef struct {
    int activation, past;
    double alpha;
} cconv_finish;

/* A map and its filter of size x size, 3 or 5, with at most size / 2 zeros on the left. Pitch in elements. */
typedef struct {
    long H, W, P, Q, row_pitch, size, stride, top, left;
} cconv_depthwise;

/* Bytes of tiles, one element each, that Winograd transforms at once: what lies between fits the first level. */
enum { CCONV_STRIP = 256 };

/* Tiles side by side whose outputs lie in vectors of output channels before they go to the maps: in the first level. */
enum { CCONV_RUN = 16 };

/* Winograd's transform in one dimension, alpha points for m outputs. Coefficients and powers are elements, in the order
 * that winograd.inc.c says; filter is G, row by row. */
typedef struct {
    int m, alpha;
    const void *coefficients, *powers;
    const double *filter;
} cconv_transform;

/* Winograd over images cut into tiles of down.m x across.m outputs, numbered along rows, down an image, over the phases
 * of the dilation (phase a x b: the rows and columns that leave these remainders), over the images. `taps` and `stride`
 * are those of both dimensions; one of stride and dilation is 1. */
typedef struct {
    cconv_transform down, across;
    int taps, stride;
    long dilation_h, dilation_w;
    long H, W, P, Q, top, left, tiles_high, tiles_wide;
    const void *zeros; /* a row of W elements */
    ptrdiff_t image_stride, channel_stride, row_stride; /* of the source, in bytes */
    long map_stride;  /* from an image's map to the next image's, in elements */
} cconv_winograd;

/* Windows of one map: output (p, q) covers rows row_start[p] .. row_stop[p]-1 in steps of row_step, same for columns.
 * With a `stride` of 1 or 2, a row that is continued by `left` and `right` columns is covered evenly: output q by
 * `taps` columns from q * stride - left on. Otherwise it is 0, and the tables alone say which columns are covered. */
typedef struct {
    int average;
    long width, outputs_high, outputs_wide;
    const int32_t *row_start, *row_stop, *row_extent;
    const int32_t *column_start, *column_stop, *column_extent;
    long row_step, column_step;
    long stride, left, right, taps;
} cconv_pool;

/* Order of planning.tensors.ARITHMETIC; behind it the operators whose operands do not commute, swapped. */
enum cconv_arithmetic {
    CCONV_ADD,
    CCONV_SUB,
    CCONV_MUL,
    CCONV_DIV,
    CCONV_MAX,
    CCONV_MIN,
    CCONV_PRELU,
    CCONV_SUB_FROM,
    CCONV_DIV_INTO,
    CCONV_PRELU_OF
};

/* Order of planning.tensors.FUNCTIONS. */
enum cconv_function { CCONV_RAMP, CCONV_CLIP, CCONV_GELU_TANH, CCONV_SWISH };

typedef struct {
    long channels, inner, size;
    double alpha, beta, bias;
} cconv_lrn;

/* Output (p, q) lies between rows row_low[p] and row_high[p], at row_weight[p] of the way; same for columns. */
typedef struct {
    long width, outputs_high, outputs_wide;
    const int32_t *row_low, *row_high, *column_low, *column_high;
    const double *row_weight, *column_weight;
} cconv_resize;

/* One instruction set and element type. `lanes` elements fill a vector; the register tile of multiply_channels is at
 * most `rows` pixels by `vectors` vectors of output channels, or fewer pixels by `wide_vectors`; that of
 * multiply_pixels `outputs` channels or less by widest[channels - 1] vectors of pixels or less. Tiles of at most
 * `kept` sums, those of multiply_pixels if they are one vector wide, keep the totals of their chains in registers. */
typedef struct {
    int lanes, rows, vectors, wide_vectors, kept, outputs;
    const unsigned char *widest;
#define CCONV_KERNEL(name, arguments) void(*name) arguments;
#include "kernels.inc"
#undef CCONV_KERNEL
} cconv_kernels;

typedef struct {
    const char *name;
    int vector_bytes;
    cconv_kernels f32, f64;
} cconv_isa;

/* The named ISA, or the best one for NULL; NULL if this processor or this build lacks it. */
const cconv_isa *cconv_select(const char *name);
/* The i-th ISA of this build from best to plainest, NULL beyond the end; *usable: whether this processor runs it. */
const cconv_isa *cconv_list(int i, int *usable);

#endif
