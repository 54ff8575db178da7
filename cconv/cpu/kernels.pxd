# Kernels: Cython's view of kernels/kernels.h. The C compiler checks every use of it against that header.

from libc.stdint cimport int32_t

cdef extern from "kernels/kernels.h" nogil:
    ctypedef struct cconv_rows:
        long channels, plane, height, width, pitch, pair, after
        long top, left, row_step, column_step
        long source_height, source_width
        Py_ssize_t channel_stride, row_stride, column_stride

    ctypedef struct cconv_gaps:
        const int32_t *at
        const int32_t *before

    ctypedef struct cconv_finish:
        int activation, past
        double alpha

    ctypedef struct cconv_depthwise:
        long H, W, P, Q, row_pitch, size, stride, top, left

    ctypedef struct cconv_transform:
        int m, alpha
        const void *coefficients
        const void *powers
        const double *filter

    ctypedef struct cconv_winograd:
        cconv_transform down, across
        int taps, stride
        long dilation_h, dilation_w
        long H, W, P, Q, top, left, tiles_high, tiles_wide
        const void *zeros
        Py_ssize_t image_stride, channel_stride, row_stride
        long map_stride

    ctypedef struct cconv_pool:
        int average
        long width, outputs_high, outputs_wide
        const int32_t *row_start
        const int32_t *row_stop
        const int32_t *row_extent
        const int32_t *column_start
        const int32_t *column_stop
        const int32_t *column_extent
        long row_step, column_step
        long stride, left, right, taps

    enum:
        CCONV_STRIP
        CCONV_RUN

    enum:
        CCONV_SUB_FROM
        CCONV_DIV_INTO
        CCONV_PRELU_OF

    ctypedef struct cconv_lrn:
        long channels, inner, size
        double alpha, beta, bias

    ctypedef struct cconv_resize:
        long width, outputs_high, outputs_wide
        const int32_t *row_low
        const int32_t *row_high
        const int32_t *column_low
        const int32_t *column_high
        const double *row_weight
        const double *column_weight

    ctypedef struct cconv_kernels:
        int lanes, rows, vectors, wide_vectors, kept, outputs
        const unsigned char *widest
        void (*pack_rows)(const cconv_rows *, const void *, void *) noexcept nogil
        void (*preactivate)(
            long, long, Py_ssize_t, const void *, const void *, const void *, void *, long) noexcept nogil
        void (*pack_panel)(long, long, long, long, const void *, void *) noexcept nogil
        void (*multiply_channels)(
            int, int, long, long, const int32_t *, const void *, const void *, void *, long, int) noexcept nogil
        void (*multiply_pixels)(
            int, int, long, long, const int32_t *, const void *, const void *, void *, long, int) noexcept nogil
        void (*multiply_row)(
            int, int, int, const cconv_gaps *, long, long, const int32_t *, const void *, const void *, void *,
            const void *, const cconv_finish *, const void *, void *, long) noexcept nogil
        void (*transpose)(long, long, const void *, long, void *, long) noexcept nogil
        void (*finish)(const cconv_finish *, double, long, long, const void *, long, const void *, void *,
                       long) noexcept nogil
        void (*settle)() noexcept nogil
        void (*expect)(long, long, const void *, long) noexcept nogil
        void (*depthwise)(const cconv_depthwise *, const cconv_finish *, double, long, long, const void *, const void *,
                          const void *, void *) noexcept nogil
        void (*winograd_filter)(
            const cconv_winograd *, long, long, long, long, const void *, void *, long) noexcept nogil
        void (*winograd_input)(
            const cconv_winograd *, long, long, long, const void *, void *, void *, long, long) noexcept nogil
        void (*winograd_output_pixels)(const cconv_winograd *, const cconv_finish *, const void *, long, long, long,
                                       const void *, long, long, void *, const void *, void *) noexcept nogil
        void (*winograd_output_channels)(const cconv_winograd *, const cconv_finish *, const void *, long, long, long,
                                         const void *, long, long, void *, const void *, void *) noexcept nogil
        void (*pool)(const cconv_pool *, const void *, void *, void *) noexcept nogil
        void (*arithmetic)(int, long, const void *, long, const void *, long, void *) noexcept nogil
        void (*function)(int, const double *, long, const void *, void *) noexcept nogil
        void (*softmax)(long, long, const void *, void *, void *) noexcept nogil
        void (*lrn)(const cconv_lrn *, long, const void *, void *) noexcept nogil
        void (*resize)(const cconv_resize *, const void *, void *, void *) noexcept nogil
        void (*matmul_row)(long, long, const void *, const void *, void *) noexcept nogil

    ctypedef struct cconv_isa:
        const char *name
        int vector_bytes
        cconv_kernels f32, f64

    const cconv_isa *cconv_select(const char *name)
    const cconv_isa *cconv_list(int i, int *usable)
