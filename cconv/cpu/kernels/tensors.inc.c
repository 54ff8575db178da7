/* Tensors: rows of arithmetic between two operands, functions of one, softmax, LRN, linear resizing, rows of matrices.
 *
 * In: T, NAME, MATH(f), simd.h, exponentials.inc.c; larger of pool.inc.c.
 * Out: arithmetic, function, softmax, lrn, resize, matmul_row.
 * Plain loops, which the compiler vectorises, but for exponentials. Comparisons are written so that NaN passes through.
 */

/* y[i] = x[i * x_step] <kind> other[i * other_step]; steps of 1 and 0 are the fast ones. */
#define EACH(expression)                                                                                               \
    if (x_step == 1 && other_step == 1)                                                                                \
        for (long i = 0; i < count; i++) {                                                                             \
            const T a = x[i], b = other[i];                                                                            \
            y[i] = expression;                                                                                         \
        }                                                                                                              \
    else if (x_step == 1 && other_step == 0) {                                                                         \
        const T b = other[0];                                                                                          \
        for (long i = 0; i < count; i++) {                                                                             \
            const T a = x[i];                                                                                          \
            y[i] = expression;                                                                                         \
        }                                                                                                              \
    } else                                                                                                             \
        for (long i = 0; i < count; i++) {                                                                             \
            const T a = x[i * x_step], b = other[i * other_step];                                                      \
            y[i] = expression;                                                                                         \
        }                                                                                                              \
    break

static void NAME(arithmetic)(int kind, long count, const void *left, long x_step, const void *right, long other_step,
                             void *target) {
    const T *x = left, *other = right;
    T *y = target;
    switch (kind) {
    case CCONV_ADD: EACH(a + b);
    case CCONV_SUB: EACH(a - b);
    case CCONV_MUL: EACH(a * b);
    case CCONV_DIV: EACH(a / b);
    case CCONV_MAX: EACH(a > b || a != a ? a : b);
    case CCONV_MIN: EACH(a < b || a != a ? a : b);
    case CCONV_PRELU: EACH(a < 0 ? b * a : a);
    /* The operands the other way round. */
    case CCONV_SUB_FROM: EACH(b - a);
    case CCONV_DIV_INTO: EACH(b / a);
    case CCONV_PRELU_OF: EACH(b < 0 ? a * b : b);
    }
}
#undef EACH

static void NAME(function)(int kind, const double *parameters, long count, const void *source, void *target) {
    const T *x = source;
    T *y = target;
    switch (kind) {
    case CCONV_RAMP: {
        const T scale = parameters[0], shift = parameters[1], low = parameters[2], high = parameters[3];
        for (long i = 0; i < count; i++) {
            T v = scale * x[i] + shift;
            v = v < low ? low : v;
            y[i] = v > high ? high : v;
        }
        break;
    }
    case CCONV_CLIP: {
        const T low = parameters[0], high = parameters[1];
        for (long i = 0; i < count; i++) {
            const T v = x[i] < low ? low : x[i];
            y[i] = v > high ? high : v;
        }
        break;
    }
    case CCONV_GELU_TANH: NAME(gelu_tanh)(0, count, (T)-0.0, x, NULL, y); break;
    case CCONV_SWISH: NAME(swish)((T)parameters[0], count, (T)-0.0, x, NULL, y); break;
    }
}

/* One distribution in neighbouring elements. Lane l sums elements l, l + LANES, ...; then the lanes are summed. */
static void NAME(softmax_row)(long count, const T *x, T *y) {
    const long whole = count / LANES * LANES;
    const NAME(lanes) rest = between(0, count - whole);
    T lane[LANES], most = x[0], total = 0;
    if (whole) {
        V m = load(x);
        for (long i = LANES; i < whole; i += LANES) m = NAME(larger)(load(x + i), m);
        store(lane, m);
        most = lane[0];
        for (int i = 1; i < LANES; i++) most = lane[i] > most || lane[i] != lane[i] ? lane[i] : most;
    }
    for (long i = whole; i < count; i++) most = x[i] > most || x[i] != x[i] ? x[i] : most;
    V sum = {0};
    for (long i = 0; i < whole; i += LANES) {
        const V e = NAME(exponential)(load(x + i) - splat(most), (V){0});
        store(y + i, e);
        sum += e;
    }
    if (whole < count) {
        store_lanes(y + whole, NAME(exponential)(load_lanes(x + whole, rest) - splat(most), (V){0}), rest);
        sum += load_lanes(y + whole, rest);
    }
    store(lane, sum);
    for (int i = 0; i < LANES; i++) total += lane[i];
    for (long i = 0; i < count; i++) y[i] /= total;
}

/* Over `channels` rows of `inner` elements; `scratch` holds 2 * inner: the maxima, then the sums. */
static void NAME(softmax)(long channels, long inner, const void *source, void *scratch, void *target) {
    const T *x = source;
    T *most = scratch, *sum = most + inner, *y = target;
    if (inner == 1) {
        NAME(softmax_row)(channels, x, y);
        return;
    }
    memcpy(most, x, inner * sizeof(T));
    for (long c = 1; c < channels; c++)
        for (long i = 0; i < inner; i++) {
            const T v = x[c * inner + i];
            most[i] = v > most[i] || v != v ? v : most[i];
        }
    memset(sum, 0, inner * sizeof(T));
    const long whole = inner / LANES * LANES;
    const NAME(lanes) rest = between(0, inner - whole);
    for (long c = 0; c < channels; c++, x += inner, y += inner) {
        for (long i = 0; i < whole; i += LANES) {
            const V e = NAME(exponential)(load(x + i) - load(most + i), (V){0});
            store(y + i, e);
            store(sum + i, load(sum + i) + e);
        }
        if (whole == inner) continue;
        const V e = NAME(exponential)(load_lanes(x + whole, rest) - load_lanes(most + whole, rest), (V){0});
        store_lanes(y + whole, e, rest);
        store_lanes(sum + whole, load_lanes(sum + whole, rest) + e, rest);
    }
    y = target;
    for (long c = 0; c < channels; c++)
        for (long i = 0; i < inner; i++) y[c * inner + i] /= sum[i];
}

/* One channel of y; x is the image. The powers of the published networks need no logarithm. */
static void NAME(lrn)(const cconv_lrn *how, long channel, const void *source, void *target) {
    const long inner = how->inner;
    const long first = channel - (how->size - 1) / 2, behind = channel + how->size / 2;
    const long begin = first < 0 ? 0 : first, end = behind >= how->channels ? how->channels - 1 : behind;
    const T *x = (const T *)source + channel * inner, scale = how->alpha / how->size, bias = how->bias;
    T *y = (T *)target + channel * inner;
    memset(y, 0, inner * sizeof(T));
    for (long c = begin; c <= end; c++) {
        const T *other = (const T *)source + c * inner;
        for (long i = 0; i < inner; i++) y[i] += other[i] * other[i];
    }
    if (how->beta == 0.75)
        for (long i = 0; i < inner; i++) {
            const T root = MATH(sqrt)(bias + scale * y[i]);
            y[i] = x[i] / (root * MATH(sqrt)(root));
        }
    else if (how->beta == 0.5)
        for (long i = 0; i < inner; i++) y[i] = x[i] / MATH(sqrt)(bias + scale * y[i]);
    else
        for (long i = 0; i < inner; i++) y[i] = x[i] / MATH(pow)(bias + scale * y[i], (T)how->beta);
}

/* One map. `scratch` holds a row of it. */
static void NAME(resize)(const cconv_resize *how, const void *source, void *scratch, void *target) {
    const T *x = source;
    T *row = scratch, *y = target;
    for (long p = 0; p < how->outputs_high; p++) {
        const T *low = x + how->row_low[p] * how->width, *high = x + how->row_high[p] * how->width;
        const T down = how->row_weight[p];
        for (long w = 0; w < how->width; w++) row[w] = low[w] * (1 - down) + high[w] * down;
        for (long q = 0; q < how->outputs_wide; q++) {
            const T across = how->column_weight[q];
            *y++ = row[how->column_low[q]] * (1 - across) + row[how->column_high[q]] * across;
        }
    }
}

/* One row of a product: y[j] = sum over k of x[k] * other[k][j]. */
static void NAME(matmul_row)(long depth, long columns, const void *row, const void *matrix, void *target) {
    const T *x = row, *other = matrix;
    T *y = target;
    memset(y, 0, columns * sizeof(T));
    for (long k = 0; k < depth; k++)
        for (long j = 0; j < columns; j++) y[j] += x[k] * other[k * columns + j];
}
