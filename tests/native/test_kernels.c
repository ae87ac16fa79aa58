/* Kernels other than products: the portable code against float64, every other set against it. */
#include "check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const em_kernels *portable;

static void near(double got, double expected, double bound, const char *what, double at) {
    CHECK(fabs(got - expected) <= bound, "%s at %g: %.9g, expected %.9g", what, at, got, expected);
}

static double activation(double x, int32_t kind) {
    switch (kind) {
    case EM_SILU: return x / (1 + exp(-x));
    case EM_GELU: return 0.5 * x * (1 + erf(x / sqrt(2)));
    case EM_GELU_TANH: return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    case EM_GELU_QUICK: return x / (1 + exp(-1.702 * x));
    case EM_RELU: return x > 0 ? x : 0;
    case EM_CLAMPED_SWIGLU: return fmin(x, 7) / (1 + exp(-1.702 * fmin(x, 7)));
    default: return x > 0 ? x * x : 0;
    }
}

static void activations_are_right(void) {
    for (int32_t kind = EM_SILU; kind <= EM_CLAMPED_SWIGLU; kind++)
        for (int i = -4000; i <= 4000; i++) {
            float x = (float)i / 100, g = x, one = kind == EM_CLAMPED_SWIGLU ? 0 : 1;
            portable->gate(&g, &one, 1, kind);
            near(g, activation(x, kind), 4e-7 * (1 + fabs(x)) * (kind == EM_RELU2 ? 41 : 1),
                 "activation", kind);
        }
    for (int i = -1000; i <= 1000; i++) {
        float up = (float)i / 100, g = 2;
        portable->gate(&g, &up, 1, EM_CLAMPED_SWIGLU);
        double of_gate = activation(2, EM_CLAMPED_SWIGLU);
        near(g, of_gate * (1 + fmax(-7, fmin(up, 7))), 1e-5, "clamped up", up);
    }
    const float extremes[] = {0, -0.0f, 3e38f, -3e38f, 1e-40f, 200, -200};
    for (int32_t kind = EM_SILU; kind <= EM_RELU; kind++)
        for (int i = 0; i < 7; i++) {
            float g = extremes[i], one = 1;
            portable->gate(&g, &one, 1, kind);
            CHECK(isfinite(g) && fabsf(g) <= fabsf(extremes[i]), "kind %d of %g is %g", kind,
                  extremes[i], g);
        }
}

static void norms_and_softmax_are_right(void) {
    for (int c = 0; c < N_LENGTHS; c++) {
        int32_t n = LENGTHS[c];
        float *x = exact((size_t)n * 4), *w = exact((size_t)n * 4), *out = exact((size_t)n * 4);
        fill_unit(x, n, 3);
        fill_unit(w, n, 4);
        portable->rms_norm(x, w, 1e-6f, n, out);
        double squares = 0, total = 0, mean = 0, spread = 0;
        for (int32_t i = 0; i < n; i++) squares += (double)x[i] * x[i];
        for (int32_t i = 0; i < n; i++)
            near(out[i], x[i] / sqrt(squares / n + 1e-6) * w[i], 1e-6 * (1 + fabs(out[i])), "norm",
                 i);
        portable->layer_norm(x, w, x, 1e-6f, n, out);
        for (int32_t i = 0; i < n; i++) mean += (double)x[i] / n;
        for (int32_t i = 0; i < n; i++) spread += (x[i] - mean) * (x[i] - mean);
        for (int32_t i = 0; i < n; i++)
            near(out[i], (x[i] - mean) / sqrt(spread / n + 1e-6) * w[i] + x[i], 1e-5, "layer norm",
                 i);
        for (int32_t i = 0; i < n; i++) total += exp((double)x[i] * 20);
        for (int32_t i = 0; i < n; i++) out[i] = x[i] * 20;
        portable->softmax(out, n);
        for (int32_t i = 0; i < n; i++)
            near(out[i], exp((double)x[i] * 20) / total, 1e-6, "softmax", i);
        free(x);
        free(w);
        free(out);
    }
}

static const int32_t KV_TYPES[] = {EM_F32, EM_F16, EM_Q8_0};

/* Values of a cache, or keys in their groups, of x [n, dim]. */
static uint8_t *kept(const em_kernels *k, const float *x, int32_t n, int32_t dim, int32_t dtype,
                     bool keys) {
    int64_t bytes = em_kv_row_bytes(dtype, dim);
    size_t size = (size_t)(em_round_up(n, keys ? EM_LANES : 1) * bytes);
    uint8_t *rows = exact(size);
    memset(rows, 0xfe, size); /* NaN: nothing but what was stored may be read */
    for (int32_t i = 0; i < n; i++)
        if (keys)
            k->store_key(x + i * dim, dim, dtype, rows + i / EM_LANES * EM_LANES * bytes,
                         i % EM_LANES);
        else
            k->store_value(x + i * dim, dim, dtype, rows + i * bytes);
    return rows;
}

/* One query over keys [begin, end). */
static void attend(const em_kernels *kernels, const float *q, const uint8_t *k, const uint8_t *v,
                   int32_t dtype, int64_t begin, int64_t end, int32_t dim, float *out) {
    int32_t padded = (int32_t)em_round_up(dim, dtype == EM_Q8_0 ? 32 : 16);
    int32_t blocks = (padded + 31) / 32;
    float *block = exact((size_t)padded * EM_SPAN_ROWS * 4), *scale = exact((size_t)blocks * 4);
    int32_t *sum = exact((size_t)blocks * 4);
    int8_t *quants = exact((size_t)blocks * 32);
    kernels->quantize(q, dim, quants, scale, sum, NULL);
    em_queries one = {.acts = {q, quants, scale, sum, NULL, padded, blocks, NULL, 0},
                      .keys = {k, em_kv_row_bytes(dtype, dim), padded},
                      .values = {v, em_kv_row_bytes(dtype, dim), padded},
                      .begin = begin,
                      .end = end,
                      .n_rows = 1,
                      .heads = 1,
                      .dtype = dtype,
                      .block = block,
                      .out = out};
    kernels->attend(&one);
    free(block);
    free(scale);
    free(sum);
    free(quants);
}

static void attention_is_right(void) {
    enum { KEYS = 70, DIM = 64 };
    static float row[KEYS * DIM], value[KEYS * DIM];
    float q[DIM], out[DIM];
    const double bounds[] = {1e-5, 4e-3, 4e-2};
    fill_unit(q, DIM, 1);
    for (int d = 0; d < DIM; d++) q[d] *= 4;
    fill_unit(row, KEYS * DIM, 2);
    fill_unit(value, KEYS * DIM, 3);
    for (int type = 0; type < 3; type++) {
        int8_t quants[DIM];
        float asked[DIM], scale[DIM / EM_BLOCK];
        int32_t sum[DIM / EM_BLOCK];
        portable->quantize(q, DIM, quants, scale, sum,
                           NULL); /* what keys of q8_0 are multiplied by */
        for (int d = 0; d < DIM; d++)
            asked[d] = KV_TYPES[type] == EM_Q8_0 ? (float)quants[d] * scale[d / EM_BLOCK] : q[d];
        uint8_t *k = kept(portable, row, KEYS, DIM, KV_TYPES[type], true);
        uint8_t *v = kept(portable, value, KEYS, DIM, KV_TYPES[type], false);
        for (int begin = 0; begin < 40; begin += 13)
            for (int end = begin + 1; end <= KEYS; end += 11) {
                double weight[KEYS], total = 0;
                attend(portable, q, k, v, KV_TYPES[type], begin, end, DIM, out);
                for (int j = begin; j < end; j++) {
                    double dot = 0;
                    for (int d = 0; d < DIM; d++) dot += (double)asked[d] * row[j * DIM + d];
                    total += weight[j] = exp(dot);
                }
                for (int d = 0; d < DIM; d++) {
                    double sum = 0;
                    for (int j = begin; j < end; j++) sum += weight[j] * value[j * DIM + d];
                    near(out[d], sum / total, bounds[type], "attention", KV_TYPES[type]);
                }
            }
        free(k);
        free(v);
    }
}

/* All 65536 halves and their neighbours, on every instruction set. */
static void halves_round_trip(const em_kernels *k) {
    enum { N = 65536 };
    uint8_t *bits = exact(N * 2);
    uint16_t *back = exact(N * 2);
    float *mine = exact(N * 4), *plain = exact(N * 4);
    for (int i = 0; i < N; i++) memcpy(bits + 2 * i, &(uint16_t){(uint16_t)i}, 2);
    k->unpack_row(bits, EM_F16, 1, N, 0, mine);
    portable->unpack_row(bits, EM_F16, 1, N, 0, plain);
    CHECK(!memcmp(mine, plain, N * 4), "%s reads halves differently", k->name);
    for (int i = 0; i < N; i++)
        if (isfinite(mine[i]))
            near(mine[i],
                 matrix_element(bits, EM_F16, 1, 0, 0) + mine[i] -
                     matrix_element(bits, EM_F16, 1, 0, 0),
                 0, "half", i);
    k->store_f16(mine, N, back);
    for (int i = 0; i < N; i++)
        if (isfinite(mine[i]))
            CHECK(back[i] == i, "%s: half %#x came back as %#x", k->name, i, back[i]);
    /* Between two halves, at the midpoint, and a hair to each side. */
    float *between = exact(3 * 31744 * 4);
    uint16_t *a = exact(3 * 31744 * 2), *b = exact(3 * 31744 * 2);
    for (int i = 0; i + 1 < 31744; i++) {
        float middle = (mine[i] + mine[i + 1]) / 2;
        between[3 * i] = nextafterf(middle, 0);
        between[3 * i + 1] = middle;
        between[3 * i + 2] = nextafterf(middle, 1e30f);
    }
    k->store_f16(between, 3 * 31744, a);
    portable->store_f16(between, 3 * 31744, b);
    CHECK(!memcmp(a, b, 3 * 31744 * 2), "%s rounds halves differently", k->name);
    free(bits);
    free(back);
    free(mine);
    free(plain);
    free(between);
    free(a);
    free(b);
}

typedef struct {
    float gate[EM_CLAMPED_SWIGLU + 1][1000], norm[1000], layer_norm[1000], soft[1000], sig[1000],
        sum[1000], turned[1000], attended[3][1024];
    uint16_t half[1000];
    uint64_t read;
} outputs;

static void run_all(const em_kernels *k, int32_t n, outputs *o) {
    static float x[1000], y[1000], wide[1024 * 72];
    memset(o, 0, sizeof *o);
    fill_unit(x, 1000, 21);
    fill_unit(y, 1000, 22);
    fill_unit(wide, 1024 * 72, 23);
    for (int32_t i = 0; i < n; i++) x[i] *= 9;
    for (int32_t a = 0; a <= EM_CLAMPED_SWIGLU; a++) {
        memcpy(o->gate[a], x, (size_t)n * 4);
        k->gate(o->gate[a], y, n, a);
    }
    k->rms_norm(x, y, 1e-5f, n, o->norm);
    k->layer_norm(x, y, x, 1e-5f, n, o->layer_norm);
    memcpy(o->soft, x, (size_t)n * 4);
    k->softmax(o->soft, n);
    memcpy(o->sig, x, (size_t)n * 4);
    k->sigmoid(o->sig, n);
    memcpy(o->sum, y, (size_t)n * 4);
    k->axpy(o->sum, 0.37f, x, n);
    k->rotate(x, y, o->sig, n / 2 * 2, o->turned);
    k->store_f16(x, n, o->half);
    for (int type = 0; type < 3; type++) {
        uint8_t *keys = kept(k, wide, 70, n, KV_TYPES[type], true);
        uint8_t *values = kept(k, wide, 70, n, KV_TYPES[type], false);
        attend(k, wide, keys, values, KV_TYPES[type], 1, 70, n, o->attended[type]);
        free(keys);
        free(values);
    }
    o->read = k->read_bytes((const uint8_t *)wide, (uint64_t)n * 64);
}

static void same_bytes(const em_kernels *k) {
    static outputs mine, plain;
    for (int c = 0; c < N_LENGTHS; c++) {
        run_all(k, LENGTHS[c], &mine);
        run_all(portable, LENGTHS[c], &plain);
        CHECK(!memcmp(&mine, &plain, sizeof mine), "%s differs at length %d", k->name, LENGTHS[c]);
    }
}

static void rows_unpack(const em_kernels *k) {
    for (int32_t dtype = 0; dtype < EM_DTYPES; dtype++)
        for (int c = 0; c < N_LENGTHS; c++) {
            int32_t cols = fitting(dtype, LENGTHS[c]);
            uint8_t *w = random_matrix(dtype, 33, cols, 8);
            float *row = exact((size_t)cols * 4);
            for (int32_t r = 0; r < 33; r++) {
                k->unpack_row(w, dtype, 16, cols, r, row);
                for (int32_t i = 0; i < cols; i++)
                    near(row[i], (float)matrix_element(w, dtype, cols, r, i), 0, DTYPES[dtype], i);
            }
            free(w);
            free(row);
        }
}

/* x [3, 16] are like `good`, but for one that is `bad`. */
static void cache_hides_nothing(const em_kernels *k, const float *x, const float *good, int at,
                                float bad) {
    float query[32] = {0}, out[32];
    fill_unit(query, 16, 5);
    for (int type = 0; type < 3; type++) {
        int32_t dtype = KV_TYPES[type];
        uint8_t *wrong = kept(k, x, 3, 16, dtype, true);
        uint8_t *right = kept(k, good, 3, 16, dtype, false);
        attend(k, query, wrong, right, dtype, 0, 3, 16, out);
        if (isnan(bad) || query[at % 16] * bad > 0 || dtype == EM_Q8_0)
            CHECK(isnan(out[0]), "%s attends to a %s key of %g", k->name, DTYPES[dtype], bad);
        free(wrong);
        free(right);
        right = kept(k, good, 3, 16, dtype, true);
        wrong = kept(k, x, 3, 16, dtype, false);
        attend(k, query, right, wrong, dtype, 0, 3, 16, out);
        CHECK(!isfinite(out[at % 16]), "%s mixes a %s value of %g", k->name, DTYPES[dtype], bad);
        free(wrong);
        free(right);
    }
}

/* What is not finite must not come out finite, from any kernel that could hide it. */
static void nothing_hides_overflow(const em_kernels *k) {
    const float bad[] = {NAN, -NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 4; i++)
        for (int at = 0; at < 48; at += 7) {
            float x[48], up[48], scale[2];
            int8_t q[64];
            int32_t sum[2];
            fill_unit(x, 48, 3);
            fill_unit(up, 48, 4);
            float good[48];
            memcpy(good, x, sizeof x);
            x[at] = bad[i];
            k->quantize(x, 48, q, scale, sum, NULL);
            CHECK(isnan(scale[at / 32]) && !isnan(scale[1 - at / 32]), "%s quantises %g", k->name,
                  bad[i]);
            cache_hides_nothing(k, x, good, at, bad[i]);
            for (int32_t kind = EM_SILU; kind <= EM_CLAMPED_SWIGLU && isnan(bad[i]); kind++) {
                float g[48];
                memcpy(g, x, sizeof g);
                k->gate(g, up, 48, kind);
                CHECK(isnan(g[at]), "%s activation %d hides NaN", k->name, kind);
                memcpy(g, up, sizeof g);
                k->gate(g, x, 48, kind);
                CHECK(isnan(g[at]), "%s activation %d hides NaN of up", k->name, kind);
            }
        }
}

/* Operands are ones; those of blocks that have not been unpacked are 129, and 1 and 8. */
static void multiply_adds_are_counted(const em_kernels *k) {
    static const double each[5][2] = {{1, 1}, {1, 1}, {1, 1}, {1, 129}, {1, 4.5}};
    for (int32_t dtype = EM_F32; dtype <= EM_Q4_0; dtype++) {
        float sum = 0;
        int64_t count = k->peak(dtype, &sum);
        double mean = (double)sum / (double)count;
        CHECK(count > 10000 && (mean == each[dtype][0] || mean == each[dtype][1]),
              "%s, dtype %d: %lld add up to %g", k->name, dtype, (long long)count, (double)sum);
    }
}

static void crc_is_castagnoli(void) {
    uint8_t data[40000];
    uint32_t state = 5;
    for (size_t i = 0; i < sizeof data; i++) data[i] = (uint8_t)random_bits(&state);
    CHECK(em_crc32c(0, "123456789", 9) == 0xE3069283u, "check value of RFC 3720%s", "");
    for (size_t n = 0; n < sizeof data; n += 997) {
        uint32_t bitwise = ~0u;
        for (size_t i = 0; i < n; i++) {
            bitwise ^= data[i];
            for (int b = 0; b < 8; b++)
                bitwise = bitwise & 1 ? bitwise >> 1 ^ 0x82F63B78u : bitwise >> 1;
        }
        CHECK(em_crc32c(0, data, n) == ~bitwise, "%zu bytes", n);
        CHECK(em_crc32c(em_crc32c(0, data, n / 3), data + n / 3, n - n / 3) == ~bitwise, "%zu", n);
    }
}

int main(void) {
    int32_t status;
    portable = em_kernels_pick("scalar", &status);
    activations_are_right();
    norms_and_softmax_are_right();
    attention_is_right();
    crc_is_castagnoli();
    for_each_isa(halves_round_trip);
    for_each_isa(same_bytes);
    for_each_isa(rows_unpack);
    for_each_isa(nothing_hides_overflow);
    for_each_isa(multiply_adds_are_counted);
    return check_report();
}
