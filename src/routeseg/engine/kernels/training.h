// The training step's passes over maps, forward and backward. ../../training/fused.py says what calls what.
//
// BatchNorm does not write a map of its own: a unit gives what its convolution made, z, and mean, scale and shift with
// which scale * (z - mean) + shift is the normalised map. Whoever reads z applies them, and ReLU, on the way. Backward,
// the reader gives the gradients of z, scale and shift; the unit adds to that of z what it owes to its statistics.
//
// Every sum over pixels is made of parts that depend on the maps' sizes alone, added in a fixed order: no result
// depends on the number of threads.
//
// Legend: B images, C channels; maps are float [B][h][w][C]. W floats in a vector, which divides C.

#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "maps.h"

namespace {

template <int W>
struct Wide {
    typedef float type __attribute__((vector_size(4 * W), aligned(4), may_alias));
};
template <int W>
using lanes = typename Wide<W>::type;
template <int W>
inline lanes<W> get(const float* p) {
    return *reinterpret_cast<const lanes<W>*>(p);
}
template <int W>
inline void put(float* p, lanes<W> x) {
    *reinterpret_cast<lanes<W>*>(p) = x;
}
// How a map is read, one vector of its channels: scale * (x - mean) + shift, or x where there is no scale, and ReLU.
template <int W>
struct Reading {
    lanes<W> mean, scale, shift;
    float low;  // the ReLU's 0, or less than all values

    Reading(const float* means, const float* scales, const float* shifts, bool relu, long i)
        : mean(scales ? get<W>(means + i) : lanes<W>{}), scale(scales ? get<W>(scales + i) : 1.0f - lanes<W>{}),
          shift(scales ? get<W>(shifts + i) : lanes<W>{}), low(relu ? 0.0f : -INFINITY) {}

    lanes<W> centered(const float* p) const { return get<W>(p) - mean; }
    lanes<W> normalised(lanes<W> centered) const { return centered * scale + shift; }
    lanes<W> operator()(const float* p) const {
        const lanes<W> value = normalised(centered(p));
        return value < low ? lanes<W>{} : value;  // NaN stays
    }
    // The gradient of a value, as far as ReLU lets it through.
    lanes<W> gradient(lanes<W> value, lanes<W> of) const { return value <= low ? lanes<W>{} : of; }
};

// Memory of a task, not initialised. The next task of the thread gets the same, which is in the cache by then.
class Floats {
  public:
    explicit Floats(size_t count) : place(taken++) {
        if (blocks.size() <= place) blocks.resize(place + 1);
        if (blocks[place].size() < count) blocks[place].resize(count);
        data = blocks[place].data();
    }
    ~Floats() { --taken; }
    Floats(const Floats&) = delete;
    operator float*() const { return data; }

  private:
    static thread_local std::vector<std::vector<float>> blocks;
    static thread_local size_t taken;
    const size_t place;
    float* data;
};
thread_local std::vector<std::vector<float>> Floats::blocks;
thread_local size_t Floats::taken = 0;

// c[r][n] (+)= sum over k of a[r * rs + k * ks] * b[k * ldb + n], for R rows and N vectors.
template <int W, int R, int N, bool ADD>
inline void block(const float* a, long rs, long ks, const float* b, long ldb, long depth, float* c, long ldc) {
    constexpr int SHARED = 3, POINTERS = (R + SHARED - 1) / SHARED;  // an address is a pointer and 0, 1 or 2 times rs
    const float* at[POINTERS];
    for (int i = 0; i < POINTERS; ++i) at[i] = a + SHARED * i * rs;
    lanes<W> sum[R][N];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[r][n] = ADD ? get<W>(c + r * ldc + n * W) : lanes<W>{};
    for (long k = 0; k < depth; ++k, b += ldb) {
        lanes<W> right[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) right[n] = get<W>(b + n * W);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const lanes<W> left = at[r / SHARED][r % SHARED * rs] - lanes<W>{};
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sum[r][n] += left * right[n];
        }
#pragma GCC unroll 4
        for (int i = 0; i < POINTERS; ++i) at[i] += ks;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) put<W>(c + r * ldc + n * W, sum[r][n]);
}

template <int W, int N, bool ADD>
void columns(long rows, const float* a, long rs, long ks, const float* b, long ldb, long depth, float* c, long ldc) {
    // As many sums as fit into the registers beside the N of b and one of a.
    constexpr int REGISTERS = V == 16 ? 32 : 16, R = std::min(12, (REGISTERS - 1 - N) / N);
    long r = 0;
    for (; r + R <= rows; r += R) block<W, R, N, ADD>(a + r * rs, rs, ks, b, ldb, depth, c + r * ldc, ldc);
    for (; r + 4 <= rows && R > 4; r += 4) block<W, 4, N, ADD>(a + r * rs, rs, ks, b, ldb, depth, c + r * ldc, ldc);
    for (; r < rows; ++r) block<W, 1, N, ADD>(a + r * rs, rs, ks, b, ldb, depth, c + r * ldc, ldc);
}

// c [rows][n] (+)= a b, with a's element (r, k) at a[r * rs + k * ks], b [depth][n].
template <int W, bool ADD>
void multiply_add(long rows, const float* a, long rs, long ks, const float* b, long n, long depth, float* c) {
    constexpr int MOST = V == 16 ? 4 : 2;
    for (long first = 0; first < n;) {
        const long vectors = std::min<long>(MOST, (n - first) / W);
        constexpr decltype(&columns<W, 1, ADD>) BY[] = {columns<W, 1, ADD>, columns<W, 2, ADD>,
                                                        columns<W, std::min(3, MOST), ADD>, columns<W, MOST, ADD>};
        BY[vectors - 1](rows, a, rs, ks, b + first, n, depth, c + first, n);
        first += vectors * W;
    }
}

// A convolution and its BatchNorm: z = conv(v) with v = x, or a * (x - center) + b, and ReLU of it if asked.
//
// kernel 1: 1x1. kernel 3, 5: depthwise, padded by kernel / 2, then 1x1. `dense`: 3x3 of an image that needs no
// gradient, without padding. Of stride 2 are 1x1 and 3x3. A 1x1 of stride SMALL_GATE_FACTOR reads x resized by 1/4,
// bilinearly: of 4 x 4 pixels the mean of the 2 x 2 in the middle.
struct Unit {
    int32_t images, h, w, inputs, outputs, kernel, stride, dense, relu;
    int32_t frozen;                   // statistics are the running ones
    const float *x, *center, *a, *b;  // of x; [inputs], or null
    const float *taps, *weight;       // [inputs][k * k], [outputs][inputs]; dense: none, [outputs][inputs][k * k]
    const float *gamma, *beta;        // [outputs]
    float *running_mean, *running_variance;
    int64_t* batches;                 // seen so far
    float momentum, epsilon;          // momentum below 0: the mean over all batches
    float *z, *mean, *scale, *shift;  // scale * (z - mean) + shift is normalised
    float* inverse;                   // 1 / the standard deviation of z
    // Backward, from here on; `plus` and the gradients of what needs none may be null.
    const float *dz, *dscale, *dshift, *plus;  // plus: added to dx
    float *dx, *da, *db, *dtaps, *dweight, *dgamma, *dbeta;

    long edge() const { return dense ? 0 : kernel / 2; }
    bool shrunk() const { return stride == SMALL_GATE_FACTOR; }
    long out_h() const { return shrunk() ? h / stride : (h + 2 * edge() - kernel) / stride + 1; }
    long out_w() const { return shrunk() ? w / stride : (w + 2 * edge() - kernel) / stride + 1; }
    long depth() const { return dense ? inputs * kernel * kernel : inputs; }  // of the product
};

constexpr long BAND_FLOATS = 1 << 16;  // of a band's rows of inputs: some of them lie in an L2 cache together
constexpr long MOST_GROUPS = 16;       // of bands, each with sums of its own
constexpr long GROUP_PIXELS = 64;      // at least

// How a map is cut: bands of rows of one image, in groups that one thread computes after another.
struct Cut {
    long rows, bands, groups;  // rows of a band; bands of an image; groups in all
    Cut(long images, long h, long w, long channels) {
        rows = std::clamp(BAND_FLOATS / (w * channels), 4L, std::max(4L, h));
        bands = (h + rows - 1) / rows;
        rows = (h + bands - 1) / bands;
        bands = (h + rows - 1) / rows;
        groups = std::clamp(images * h * w / GROUP_PIXELS, 1L, std::min(MOST_GROUPS, images * bands));
    }
    // Calls work(group, image, first row, end row) for all bands, in order within a group.
    template <class Work>
    void run(long images, long h, int threads, const Work& work) const {
        const long total = images * bands;
        pool->run(groups, threads, [&](long group) {
            for (long band = group * total / groups; band < (group + 1) * total / groups; ++band) {
                const long image = band / bands, first = band % bands * rows;
                work(group, image, first, std::min(h, first + rows));
            }
        });
    }
};

// v of a row of inputs, of every `step`-th pixel.
template <int W>
inline void activate(const Unit& unit, const float* x, long pixels, long step, float* out) {
    const long c = unit.inputs;
    for (long i = 0; i < c; i += W) {
        const Reading<W> reading(unit.center, unit.a, unit.b, unit.relu, i);
        for (long p = 0; p < pixels; ++p) put<W>(out + p * c + i, reading(x + p * step * c + i));
    }
}

// Rows first..end of v, with `edge` columns more on each side; zeros outside the image.
template <int W>
void padded_rows(const Unit& unit, const float* image, long first, long end, long edge, float* out) {
    const long c = unit.inputs, w = unit.w, line = (w + 2 * edge) * c;
    for (long y = first; y < end; ++y, out += line) {
        if (y < 0 || y >= unit.h) {
            std::memset(out, 0, sizeof(float) * line);
            continue;
        }
        std::memset(out, 0, sizeof(float) * edge * c);
        activate<W>(unit, image + y * w * c, w, 1, out + edge * c);
        std::memset(out + (edge + w) * c, 0, sizeof(float) * edge * c);
    }
}

// BLOCK pixels of the output of `correlate`, from pixel x on.
template <int W, int K, int S, bool FLIP, int BLOCK>
inline void correlate_block(const float* rows, long line, long x, long c, const float* taps, float* out) {
    for (long i = 0; i < c; i += W) {
        lanes<W> sum[BLOCK] = {};
#pragma GCC unroll 8
        for (int ty = 0; ty < K; ++ty) {
            const float* from = rows + ty * line + x * S * c + i;
            lanes<W> tap[K];
#pragma GCC unroll 8
            for (int tx = 0; tx < K; ++tx) {
                const int at = ty * K + tx;
                tap[tx] = get<W>(taps + (FLIP ? K * K - 1 - at : at) * c + i);
            }
#pragma GCC unroll 32
            for (int column = 0; column < (BLOCK - 1) * S + K; ++column) {
                const lanes<W> value = get<W>(from + column * c);
#pragma GCC unroll 8
                for (int o = 0; o < BLOCK; ++o)
                    if (column - o * S >= 0 && column - o * S < K) sum[o] += tap[column - o * S] * value;
            }
        }
#pragma GCC unroll 8
        for (int o = 0; o < BLOCK; ++o) put<W>(out + (x + o) * c + i, sum[o]);
    }
}

// out [w][c] = sum over taps of rows, which are padded, at every S-th pixel; FLIP: taps are read from the last on.
template <int W, int K, int S, bool FLIP>
void correlate(const float* rows, long line, long w, long c, const float* taps, float* out) {
    constexpr int BLOCK = K == 3 && S == 1 && V == 16 ? 8 : 4;  // that share the inputs they load, in registers
    long x = 0;
    for (; x + BLOCK <= w; x += BLOCK) correlate_block<W, K, S, FLIP, BLOCK>(rows, line, x, c, taps, out);
    for (; x < w; ++x) correlate_block<W, K, S, FLIP, 1>(rows, line, x, c, taps, out);
}

// dtaps [k * k][c] += sum over pixels of the padded rows, shifted by each tap, times g [w][c].
template <int W, int K, int S>
void correlate_taps(const float* rows, long line, const float* g, long w, long c, float* dtaps) {
    for (long i = 0; i < c; i += W)
        for (int ty = 0; ty < K; ++ty) {
            lanes<W> sum[K];
#pragma GCC unroll 8
            for (int tx = 0; tx < K; ++tx) sum[tx] = get<W>(dtaps + (ty * K + tx) * c + i);
            const float* from = rows + ty * line + i;
            for (long x = 0; x < w; ++x) {
                const lanes<W> grad = get<W>(g + x * c + i);
#pragma GCC unroll 8
                for (int tx = 0; tx < K; ++tx) sum[tx] += grad * get<W>(from + (x * S + tx) * c);
            }
#pragma GCC unroll 8
            for (int tx = 0; tx < K; ++tx) put<W>(dtaps + (ty * K + tx) * c + i, sum[tx]);
        }
}

// What a 3 x 3 depthwise convolution of stride 2 sends back to a row of its input, [w][c], from the rows `g` at and
// `below` half its height, padded by a column on each side. `odd`: its number is odd.
template <int W>
void spread(const float* g, const float* below, bool odd, long w, long c, const float* taps, float* out) {
    for (long x = 0; x < w; ++x) {
        const long at = (x / 2 + 1) * c;  // behind the padding
        for (long i = 0; i < c; i += W) {
            const auto term = [&](int ty, int tx, const float* row, long place) {
                return get<W>(taps + (ty * 3 + tx) * c + i) * get<W>(row + place + i);
            };
            lanes<W> sum;
            if (odd) {
                sum = x % 2 ? term(0, 0, below, at + c) + term(0, 2, below, at) + term(2, 0, g, at + c) +
                                  term(2, 2, g, at)
                            : term(0, 1, below, at) + term(2, 1, g, at);
            } else {
                sum = x % 2 ? term(1, 0, g, at + c) + term(1, 2, g, at) : term(1, 1, g, at);
            }
            put<W>(out + x * c + i, sum);
        }
    }
}

// The k x k x inputs values that each pixel of a row of the output is made of, side by side: out [w][inputs * k * k].
inline void patches(const Unit& unit, const float* image, long y, float* out) {
    const long k = unit.kernel, c = unit.inputs;
    for (long x = 0; x < unit.out_w(); ++x)
        for (long i = 0; i < c; ++i)
            for (long ty = 0; ty < k; ++ty)
                for (long tx = 0; tx < k; ++tx)
                    *out++ = image[((y * unit.stride + ty) * unit.w + x * unit.stride + tx) * c + i];
}

inline std::vector<float> transposed(const float* matrix, long rows, long columns) {
    std::vector<float> out(rows * columns);
    for (long r = 0; r < rows; ++r)
        for (long c = 0; c < columns; ++c) out[c * rows + r] = matrix[r * columns + c];
    return out;
}

// Number, mean, and sum of squares about it, of each channel.
struct Moments {
    double count = 0;
    std::vector<double> mean, squares;
    explicit Moments(long channels) : mean(channels), squares(channels) {}

    template <class Values>
    void add(double more, const Values& their_mean, const Values& their_squares) {
        if (more == 0) return;
        const double all = count + more, share = more / all;
        for (size_t i = 0; i < mean.size(); ++i) {
            const double difference = their_mean[i] - mean[i];
            mean[i] += difference * share;
            squares[i] += their_squares[i] + difference * difference * count * share;
        }
        count = all;
    }
};

// Adds the moments of z [pixels][c].
template <int W>
void add_moments(const float* z, long pixels, long c, Moments& moments) {
    std::vector<float> mean(c), squares(c);
    const lanes<W> each = 1.0f / pixels - lanes<W>{};
    for (long i = 0; i < c; i += W) {
        lanes<W> sum = {}, other = {};
        for (long p = 0; p < pixels; ++p) sum += get<W>(z + p * c + i);
        sum *= each;
        put<W>(mean.data() + i, sum);
        for (long p = 0; p < pixels; ++p) {
            const lanes<W> away = get<W>(z + p * c + i) - sum;
            other += away * away;
        }
        put<W>(squares.data() + i, other);
    }
    moments.add(double(pixels), mean, squares);
}

inline void check(const Unit& unit) {
    const int k = unit.kernel, s = unit.stride;
    require((k == 1 && (s == 1 || s == 2 || s == SMALL_GATE_FACTOR)) || (k == 3 && (s == 1 || s == 2)) ||
                (k == 5 && s == 1),
            "a unit has another kernel");
    require(!unit.dense || (k == 3 && !unit.relu && !unit.a), "a dense unit reads something else than an image");
    require(!unit.shrunk() || (!unit.relu && !unit.a && std::min(unit.h, unit.w) >= s), "a unit resizes another map");
    require(unit.images > 0 && std::max(unit.h, unit.w) <= MOST_SIDE, "a unit has no map");
    require(std::min(unit.h, unit.w) >= (unit.dense ? k : 1), "a unit has no map");
    require(unit.inputs > 0 && unit.outputs > 0 && std::max(unit.inputs, unit.outputs) <= MOST_CHANNELS,
            "a unit has another number of channels");
    require(unit.x && unit.weight && unit.gamma && unit.beta && unit.z && unit.scale && unit.shift && unit.mean &&
                unit.inverse && (unit.taps || unit.dense || k == 1) && !unit.a == !unit.b && !unit.a == !unit.center,
            "a unit lacks memory");
}

// Rows and columns of the input that a band of the output reads, and memory for them and for the product's input.
template <int W>
struct Band {
    const Unit& unit;
    const long c, w, line;  // w: of the output; line: of a padded row of the input
    Floats padded, made;

    Band(const Unit& unit, long rows)
        : unit(unit), c(unit.inputs), w(unit.out_w()), line((unit.w + 2 * unit.edge()) * c),
          padded(unit.edge() ? ((rows - 1) * unit.stride + unit.kernel) * line : 0), made(rows * w * unit.depth()) {}

    // From the second of four rows.
    void shrink_row(const float* x, float* out) const {
        const long row = unit.w * c, step = unit.stride * c;
        for (long i = 0; i < c; i += W)
            for (long p = 0; p < w; ++p) {
                const float* at = x + p * step + c + i;
                put<W>(out + p * c + i,
                       0.25f * (get<W>(at) + get<W>(at + c) + get<W>(at + row) + get<W>(at + row + c)));
            }
    }

    // What the convolution's product reads, for rows first..end of the output: [rows * w][depth].
    const float* read(const float* image, const float* taps, long first, long end) {
        const long s = unit.stride, k = unit.kernel;
        if (unit.dense) {
            for (long y = first; y < end; ++y) patches(unit, image, y, made + (y - first) * w * unit.depth());
            return made;
        }
        if (unit.edge() == 0) {
            if (s == 1 && !unit.a && !unit.relu) return image + first * w * c;
            if (unit.shrunk()) {
                for (long y = first; y < end; ++y)
                    shrink_row(image + (y * s + 1) * unit.w * c, made + (y - first) * w * c);
                return made;
            }
            for (long y = first; y < end; ++y)
                activate<W>(unit, image + y * s * unit.w * c, w, s, made + (y - first) * w * c);
            return made;
        }
        const long top = first * s - unit.edge();
        padded_rows<W>(unit, image, top, top + (end - first - 1) * s + k, unit.edge(), padded);
        auto go = k == 5 ? correlate<W, 5, 1, false> : s == 2 ? correlate<W, 3, 2, false> : correlate<W, 3, 1, false>;
        for (long y = 0; y < end - first; ++y) go(padded + y * s * line, line, w, c, taps, made + y * w * c);
        return made;
    }
};

template <int W>
void unit_forward(const Unit& unit, int threads) {
    require(unit.running_mean && unit.running_variance && unit.batches, "a unit lacks statistics");
    const long c = unit.inputs, n = unit.outputs, depth = unit.depth(), h = unit.out_h(), w = unit.out_w();
    const std::vector<float> weight = transposed(unit.weight, n, depth);
    const std::vector<float> taps =
        unit.taps ? transposed(unit.taps, c, unit.kernel * unit.kernel) : std::vector<float>();
    const Cut cut(unit.images, h, w, std::max(depth, n));
    std::vector<Moments> moments(cut.groups, Moments(unit.frozen ? 0 : n));
    cut.run(unit.images, h, threads, [&](long group, long image, long first, long end) {
        Band<W> band(unit, cut.rows);
        const float* input = band.read(unit.x + image * unit.h * unit.w * c, taps.data(), first, end);
        float* z = unit.z + (image * h + first) * w * n;
        const long pixels = (end - first) * w;
        multiply_add<W, false>(pixels, input, depth, 1, weight.data(), n, depth, z);
        if (!unit.frozen) add_moments<W>(z, pixels, n, moments[group]);
    });
    if (!unit.frozen) {
        Moments all(n);
        for (const Moments& some : moments) all.add(some.count, some.mean, some.squares);
        *unit.batches += 1;
        const double share = unit.momentum < 0 ? 1.0 / double(*unit.batches) : unit.momentum;
        for (long i = 0; i < n; ++i) {
            const double variance = all.squares[i] / all.count;
            unit.mean[i] = float(all.mean[i]);
            unit.inverse[i] = float(1 / std::sqrt(variance + unit.epsilon));
            const double unbiased = all.squares[i] / std::max(1.0, all.count - 1);
            unit.running_mean[i] = float(unit.running_mean[i] + share * (all.mean[i] - unit.running_mean[i]));
            unit.running_variance[i] = float(unit.running_variance[i] + share * (unbiased - unit.running_variance[i]));
        }
    } else {
        for (long i = 0; i < n; ++i) {
            unit.mean[i] = unit.running_mean[i];
            unit.inverse[i] = float(1 / std::sqrt(double(unit.running_variance[i]) + unit.epsilon));
        }
    }
    for (long i = 0; i < n; ++i) {
        unit.scale[i] = unit.gamma[i] * unit.inverse[i];
        unit.shift[i] = unit.beta[i];
    }
}

// Adds up the sums of all groups: [groups][count] -> out [count].
inline void total(const std::vector<float>& parts, long groups, long count, float* out, int threads) {
    constexpr long CHUNK = 4096;
    pool->run((count + CHUNK - 1) / CHUNK, threads, [&](long chunk) {
        const long first = chunk * CHUNK, end = std::min(count, first + CHUNK);
        std::memcpy(out + first, parts.data() + first, sizeof(float) * (end - first));
        for (long group = 1; group < groups; ++group)
            for (long i = first; i < end; ++i) out[i] += parts[group * count + i];
    });
}

template <int W>
void unit_backward(const Unit& unit, int threads) {
    require(unit.mean && unit.dz && unit.dscale && unit.dshift && (unit.dx || unit.dense) && unit.dweight &&
                unit.dgamma && unit.dbeta && (unit.dtaps || !unit.taps) && (!unit.a || (unit.da && unit.db)),
            "a unit lacks memory for its gradients");
    const long c = unit.inputs, n = unit.outputs, depth = unit.depth(), k2 = unit.kernel * unit.kernel, s = unit.stride;
    const long h = unit.out_h(), w = unit.out_w(), edge = unit.edge();
    const double count = double(unit.images) * h * w;
    // dz in all = dz + constant + slope * (z - mean): through mean and variance.
    std::vector<float> constant(n), slope(n);
    for (long i = 0; i < n; ++i) {
        const double inverse = unit.inverse[i], dscale = unit.dscale[i];
        unit.dgamma[i] = float(dscale * inverse);
        unit.dbeta[i] = unit.dshift[i];
        if (unit.frozen) continue;
        const double dvariance = -0.5 * dscale * unit.gamma[i] * inverse * inverse * inverse;
        slope[i] = float(2 * dvariance / count);
        constant[i] = float(-double(unit.dshift[i]) * unit.scale[i] / count);
    }
    const std::vector<float> taps = unit.taps ? transposed(unit.taps, c, k2) : std::vector<float>();
    const Cut cut(unit.images, h, w, std::max(depth, n));
    // Of a dense unit's weights the transpose, since its depth is no multiple of a vector.
    std::vector<float> dweight(cut.groups * n * depth), dtaps(unit.taps ? cut.groups * k2 * c : 0);
    std::vector<float> da(unit.a ? cut.groups * c : 0), db(da.size());
    cut.run(unit.images, h, threads, [&](long group, long image, long first, long end) {
        const long rows = end - first, above = std::max(0L, first - edge), below = std::min(h, end + edge);
        const float* from = unit.x + image * unit.h * unit.w * c;
        // The gradient of z, also of the rows beside the band.
        const Floats gradient((cut.rows + 2 * edge) * w * n);
        {
            const long offset = (image * h + above) * w * n;
            const float *dz = unit.dz + offset, *z = unit.z + offset;
            for (long y = 0; y < below - above; ++y)
                for (long i = 0; i < n; i += W) {
                    const lanes<W> more = get<W>(&constant[i]), times = get<W>(&slope[i]), mean = get<W>(unit.mean + i);
                    for (long at = y * w * n + i; at < (y + 1) * w * n; at += n)
                        put<W>(gradient + at, get<W>(dz + at) + more + times * (get<W>(z + at) - mean));
                }
        }
        const float* own = gradient + (first - above) * w * n;
        Band<W> band(unit, cut.rows);
        const float* input = band.read(from, taps.data(), first, end);
        float* sums = dweight.data() + group * n * depth;
        if (unit.dense) return multiply_add<W, true>(depth, input, 1, depth, own, n, rows * w, sums);
        multiply_add<W, true>(n, own, 1, n, input, c, rows * w, sums);

        // The gradient of v, for the rows of the input that are this band's: [..][unit.w][c], or [..][w][c] of 1x1.
        const long mine = first * s, end_of_mine = end == h ? unit.h : end * s, wide = edge ? unit.w : w;
        const Floats dv((edge ? cut.rows * s : cut.rows) * wide * c);
        if (edge == 0) {
            multiply_add<W, false>(rows * w, own, n, 1, unit.weight, c, n, dv);
        } else {
            const long line = (w + 2 * edge) * c;  // of the gradient of the product's input, padded
            const Floats padded((cut.rows + 2 * edge) * line);
            for (long y = first - edge; y < end + edge; ++y) {
                float* to = padded + (y - first + edge) * line;
                if (y < 0 || y >= h) {
                    std::memset(to, 0, sizeof(float) * line);
                    continue;
                }
                std::memset(to, 0, sizeof(float) * edge * c);
                multiply_add<W, false>(w, gradient + (y - above) * w * n, n, 1, unit.weight, c, n, to + edge * c);
                std::memset(to + (edge + w) * c, 0, sizeof(float) * edge * c);
            }
            auto taps_go = unit.kernel == 5 ? correlate_taps<W, 5, 1>
                           : s == 2         ? correlate_taps<W, 3, 2>
                                            : correlate_taps<W, 3, 1>;
            for (long y = 0; y < rows; ++y)
                taps_go(band.padded + y * s * band.line, band.line, padded + (y + edge) * line + edge * c, w, c,
                        dtaps.data() + group * k2 * c);
            auto go = unit.kernel == 5 ? correlate<W, 5, 1, true> : correlate<W, 3, 1, true>;
            for (long y = mine; y < end_of_mine; ++y) {
                float* to = dv + (y - mine) * wide * c;
                if (s == 1) {
                    go(padded + (y - first) * line, line, w, c, taps.data(), to);
                } else {
                    const float* g = padded + (y / 2 - first + edge) * line;
                    spread<W>(g, g + line, y % 2, wide, c, taps.data(), to);
                }
            }
        }
        // From v to x.
        const long step = edge ? 1 : s;  // rows and columns that 1x1 leaves out have no gradient of their own
        for (long y = mine; y < end_of_mine; ++y) {
            const long offset = (image * unit.h + y) * unit.w * c;
            const float *x = unit.x + offset, *plus = unit.plus ? unit.plus + offset : nullptr;
            float* dx = unit.dx + offset;
            if (step > 1) {
                if (plus) std::memcpy(dx, plus, sizeof(float) * unit.w * c);
                else std::memset(dx, 0, sizeof(float) * unit.w * c);
                if (unit.shrunk() ? y / s >= end || (y % s != 1 && y % s != 2) : (y - mine) % step) continue;
            }
            const float* gradients = dv + (y - mine) / step * wide * c;
            if (unit.shrunk()) {
                for (long p = 0; p < w; ++p)
                    for (long i = 0; i < c; i += W)
                        for (float* to = dx + (p * s + 1) * c + i; to < dx + (p * s + 3) * c; to += c)
                            put<W>(to, get<W>(to) + 0.25f * get<W>(gradients + p * c + i));
                continue;
            }
            for (long i = 0; i < c; i += W) {
                const Reading<W> reading(unit.center, unit.a, unit.b, unit.relu, i);
                lanes<W> sum_a = {}, sum_b = {};
                for (long p = 0; p < wide; ++p) {
                    const long at = p * step * c + i;
                    const lanes<W> value = reading.centered(x + at);
                    lanes<W> grad = reading.gradient(reading.normalised(value), get<W>(gradients + p * c + i));
                    sum_a += grad * value;
                    sum_b += grad;
                    grad *= reading.scale;
                    put<W>(dx + at, plus ? grad + get<W>(plus + at) : grad);
                }
                if (!unit.a) continue;
                put<W>(&da[group * c + i], get<W>(&da[group * c + i]) + sum_a);
                put<W>(&db[group * c + i], get<W>(&db[group * c + i]) + sum_b);
            }
        }
    });
    if (unit.dense) {
        std::vector<float> sums(depth * n);
        total(dweight, cut.groups, depth * n, sums.data(), threads);
        for (long r = 0; r < depth; ++r)
            for (long i = 0; i < n; ++i) unit.dweight[i * depth + r] = sums[r * n + i];
        return;
    }
    total(dweight, cut.groups, n * c, unit.dweight, threads);
    if (unit.taps) {
        std::vector<float> sums(k2 * c);
        total(dtaps, cut.groups, k2 * c, sums.data(), threads);
        for (long t = 0; t < k2; ++t)
            for (long i = 0; i < c; ++i) unit.dtaps[i * k2 + t] = sums[t * c + i];
    }
    if (unit.a) total(da, cut.groups, c, unit.da, threads), total(db, cut.groups, c, unit.db, threads);
}

// One of the maps of a sum: weight * (scale * (map - mean) + shift, with ReLU if asked), of half the size if halved.
struct Term {
    const float *map, *mean, *scale, *shift;  // of the map; [C], or null
    const float* weight;                      // [B], or null
    int32_t relu, halved;
    float *dmap, *dscale, *dshift, *dweight;  // null where nobody asks
};

struct Sum {
    int32_t images, h, w, c, terms;
    const Term* term;
    float* out;
    const float* dout;
};

constexpr int MOST_TERMS = 8;

inline void check(const Sum& sum) {
    require(sum.images > 0 && sum.h > 0 && sum.w > 0 && std::max(sum.h, sum.w) <= MOST_SIDE, "a sum has no map");
    require(sum.c > 0 && sum.c <= MOST_CHANNELS && sum.terms > 0 && sum.terms <= MOST_TERMS, "a sum has no terms");
    for (int i = 0; i < sum.terms; ++i) {
        const Term& term = sum.term[i];
        require(term.map && !term.scale == !term.shift && !term.scale == !term.mean, "a sum's term lacks memory");
        require(!term.halved || (sum.h % 2 == 0 && sum.w % 2 == 0), "a sum's sides are odd");
    }
}

template <int W>
Reading<W> reading_of(const Term& term, long i) {
    return Reading<W>(term.mean, term.scale, term.shift, term.relu, i);
}

template <int W>
void sum_forward(const Sum& sum, int threads) {
    const long c = sum.c, h = sum.h, w = sum.w;
    pool->rows(long(sum.images) * h, threads, [&](long row) {
        const long image = row / h, y = row % h;
        float* out = sum.out + row * w * c;
        bool first = true;
        for (int t = 0; t < sum.terms; ++t) {
            const Term& term = sum.term[t];
            const float weight = term.weight ? term.weight[image] : 1.0f;
            if (weight == 0 && !first) continue;
            const long half = w / 2;
            if (!term.halved) {
                const float* from = term.map + row * w * c;
                for (long i = 0; i < c; i += W) {
                    const Reading<W> value = reading_of<W>(term, i);
                    for (long at = i; at < w * c; at += c) {
                        const lanes<W> own = weight * value(from + at);
                        put<W>(out + at, first ? own : get<W>(out + at) + own);
                    }
                }
            } else {
                const long near = y / 2, far = std::clamp(near + (y % 2 ? 1L : -1L), 0L, h / 2 - 1);
                const float* map = term.map + image * (h / 2) * half * c;
                const float *upper = map + near * half * c, *lower = map + far * half * c;
                float* line = reinterpret_cast<float*>(scratch(sizeof(float) * half * c));
                for (long i = 0; i < c; i += W) {
                    const Reading<W> value = reading_of<W>(term, i);
                    for (long at = i; at < half * c; at += c)
                        put<W>(line + at, weight * (0.75f * value(upper + at) + 0.25f * value(lower + at)));
                    for (long x = 0; x < w; ++x) {
                        const float* a = line + x / 2 * c + i;
                        const float* b = line + std::clamp(x / 2 + (x % 2 ? 1L : -1L), 0L, half - 1) * c + i;
                        const lanes<W> own = 0.75f * get<W>(a) + 0.25f * get<W>(b);
                        put<W>(out + x * c + i, first ? own : get<W>(out + x * c + i) + own);
                    }
                }
            }
            first = false;
        }
    });
}

// What the gradient of a resized row is for the row of half the size: rows of [w][c] -> out [w / 2][c].
template <int W>
void halve(const float* line, long w, long c, float* out) {
    const long half = w / 2;
    for (long x = 0; x < half; ++x)
        for (long i = 0; i < c; i += W) {
            const float* at = line + 2 * x * c + i;
            const lanes<W> before = get<W>(x > 0 ? at - c : at), after = get<W>(x + 1 < half ? at + 2 * c : at + c);
            put<W>(out + x * c + i, 0.75f * (get<W>(at) + get<W>(at + c)) + 0.25f * (before + after));
        }
}

template <int W>
void sum_backward(const Sum& sum, int threads) {
    const long c = sum.c;
    for (int t = 0; t < sum.terms; ++t) {
        const Term& term = sum.term[t];
        if (!term.dmap) continue;
        const long s = term.halved ? 2 : 1, h = sum.h / s, w = sum.w / s;
        const Cut cut(sum.images, h, w, c);
        const long parts = sum.images * cut.bands;  // one for each band: an image's weight is not another's
        std::vector<float> dscale(term.scale ? parts * c : 0), dshift(dscale.size());
        std::vector<double> dweight(term.weight ? parts : 0);
        pool->run(parts, threads, [&](long part) {
            const long image = part / cut.bands, first = part % cut.bands * cut.rows;
            const float weight = term.weight ? term.weight[image] : 1.0f;
            const Floats line(s > 1 ? sum.w * c : 0), halved(s > 1 ? w * c : 0);
            const Floats own_scale(c), own_shift(c), own_weight(c);
            for (long i = 0; i < c; ++i) own_scale[i] = own_shift[i] = own_weight[i] = 0;
            for (long y = first; y < std::min(h, first + cut.rows); ++y) {
                const float* grad = sum.dout + (image * sum.h + y * s) * sum.w * c;
                if (s > 1) {
                    const long row = sum.w * c;
                    const float *above = y > 0 ? grad - row : grad, *below = y + 1 < h ? grad + 2 * row : grad + row;
                    for (long j = 0; j < row; j += W)
                        put<W>(line + j, 0.75f * (get<W>(grad + j) + get<W>(grad + row + j)) +
                                             0.25f * (get<W>(above + j) + get<W>(below + j)));
                    halve<W>(line, sum.w, c, halved);
                    grad = halved;
                }
                const long offset = (image * h + y) * w * c;
                const float* from = term.map + offset;
                float* to = term.dmap + offset;
                for (long i = 0; i < c; i += W) {
                    const Reading<W> reading = reading_of<W>(term, i);
                    lanes<W> to_scale = {}, to_shift = {}, to_weight = {};
                    for (long at = i; at < w * c; at += c) {
                        const lanes<W> z = reading.centered(from + at), value = reading.normalised(z);
                        lanes<W> g = reading.gradient(value, get<W>(grad + at));
                        to_weight += g * value;
                        g *= weight;
                        to_scale += g * z;
                        to_shift += g;
                        put<W>(to + at, g * reading.scale);
                    }
                    put<W>(own_scale + i, get<W>(own_scale + i) + to_scale);
                    put<W>(own_shift + i, get<W>(own_shift + i) + to_shift);
                    put<W>(own_weight + i, get<W>(own_weight + i) + to_weight);
                }
            }
            if (term.scale) {
                std::copy_n(own_scale + 0, c, dscale.data() + part * c);
                std::copy_n(own_shift + 0, c, dshift.data() + part * c);
            }
            if (term.weight)
                for (long i = 0; i < c; ++i) dweight[part] += own_weight[i];
        });
        if (term.scale) total(dscale, parts, c, term.dscale, threads), total(dshift, parts, c, term.dshift, threads);
        for (long image = 0; term.weight && image < sum.images; ++image) {
            double all = 0;
            for (long band = 0; band < cut.bands; ++band) all += dweight[image * cut.bands + band];
            term.dweight[image] = float(all);
        }
    }
}

// The mean over the pixels of ReLU(scale * (z - mean) + shift): [B][pixels][C] -> [B][C].
struct Mean {
    int32_t images, pixels, c;
    const float *z, *mean, *scale, *shift;
    float* out;
    const float* dout;
    float *dz, *dscale, *dshift;
};

inline void check(const Mean& mean) {
    require(mean.images > 0 && mean.pixels > 0 && mean.c > 0 && mean.c <= MOST_CHANNELS, "a mean has no map");
    require(mean.z && mean.mean && mean.scale && mean.shift, "a mean lacks memory");
}

constexpr long MEAN_PIXELS = 256;  // of a part of a sum

template <int W>
void mean_forward(const Mean& mean, int threads) {
    const long c = mean.c, pixels = mean.pixels;
    pool->run(mean.images, threads, [&](long image) {
        std::vector<double> all(c);
        for (long i = 0; i < c; i += W)
            for (long first = 0; first < pixels; first += MEAN_PIXELS) {
                lanes<W> sum = {};
                const Reading<W> reading(mean.mean, mean.scale, mean.shift, true, i);
                for (long p = first; p < std::min(pixels, first + MEAN_PIXELS); ++p)
                    sum += reading(mean.z + (image * pixels + p) * c + i);
                for (int lane = 0; lane < W; ++lane) all[i + lane] += sum[lane];
            }
        for (long i = 0; i < c; ++i) mean.out[image * c + i] = float(all[i] / double(pixels));
    });
}

template <int W>
void mean_backward(const Mean& mean, int threads) {
    require(mean.dout && mean.dz && mean.dscale && mean.dshift, "a mean lacks memory for its gradients");
    const long c = mean.c, pixels = mean.pixels;
    std::vector<float> dscale(mean.images * c), dshift(mean.images * c);
    pool->run(mean.images, threads, [&](long image) {
        for (long i = 0; i < c; i += W) {
            lanes<W> sum_scale = {}, sum_shift = {};
            const Reading<W> reading(mean.mean, mean.scale, mean.shift, true, i);
            const lanes<W> g = get<W>(mean.dout + image * c + i) / float(pixels);
            for (long p = 0; p < pixels; ++p) {
                const long at = (image * pixels + p) * c + i;
                const lanes<W> z = reading.centered(mean.z + at), own = reading.gradient(reading.normalised(z), g);
                sum_scale += own * z;
                sum_shift += own;
                put<W>(mean.dz + at, own * reading.scale);
            }
            put<W>(dscale.data() + image * c + i, sum_scale);
            put<W>(dshift.data() + image * c + i, sum_shift);
        }
    });
    total(dscale, mean.images, c, mean.dscale, threads);
    total(dshift, mean.images, c, mean.dshift, threads);
}

// The sum over pixels of the cross-entropy of logits [B][K][height][width] with labels [B][height][width], each times
// its weight. The logits are scores [B][K][h][w] enlarged by four, bilinear, as far as there are labels. They are made
// a row at a time; so is their gradient, which becomes that of the scores.
struct Entropy {
    int32_t images, classes, h, w, height, width;
    const float* scores;
    const int64_t* labels;
    const float* weights;  // [B][height][width], or null: 1
    int64_t ignored;       // a label that counts for nothing
    double* loss;
    float* dscores;
};

inline void check(const Entropy& e) {
    require(e.images > 0 && e.classes > 0 && e.h > 0 && e.w > 0 && std::max(e.h, e.w) <= MOST_SIDE && e.height > 0 &&
                e.width > 0 && e.height <= 4 * e.h && e.width <= 4 * e.w,
            "a cross-entropy has no size");
    require(e.scores && e.labels && e.loss && e.dscores, "a cross-entropy lacks memory");
}

typedef int32_t whole __attribute__((vector_size(4 * V), aligned(4), may_alias));

// e^x for x <= 0, to float rounding (polynomial: Cephes); 0 below -87.
inline vec exponential(vec x) {
    const vec bounded = maximum(splat(-87.0f), x);
    const vec shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to a whole number
    const vec n = shifted - 12582912.0f;
    const vec r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    for (const float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f})
        p = p * r + factor;
    p = p * r * r + r + 1.0f;
    const whole power = (whole)shifted << 23;  // n, as the exponent of a float
    return (vec)((whole)p + power);
}

// log x for normal x (polynomial: Cephes).
inline vec logarithm(vec x) {
    const whole bits = (whole)x;
    vec m = (vec)((bits & 0x7fffff) | 0x3f800000), n = __builtin_convertvector((bits >> 23) - 127, vec);
    const auto large = m > splat(1.41421356f);
    m = large ? m * 0.5f : m;
    n = large ? n + 1.0f : n;
    m -= 1.0f;
    vec p = splat(7.0376836292e-2f);
    for (const float factor : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                               -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f})
        p = p * m + factor;
    return m + (p * m * m * m - n * 2.12194440e-4f - 0.5f * m * m) + n * 0.693359375f;
}

// Of the four pixels of a score: the share of the score before it, of itself, of the one behind it.
constexpr float BEFORE[] = {0.375f, 0.125f, 0, 0}, ITSELF[] = {0.625f, 0.875f, 0.875f, 0.625f},
                BEHIND[] = {0, 0, 0.125f, 0.375f};
constexpr long ENTROPY_ROWS = 16;  // of scores, of a task

// The pixels of a row of logits, in four phases: the first pixels of all scores, the second ones, and so on. A phase
// has `stride` floats, w of them used; what is behind them counts 0.
class EntropyRow {
  public:
    explicit EntropyRow(const Entropy& e)
        : e(e), stride((e.w + V) / V * V + V), line_floats(e.classes * stride), line(line_floats),
          logits(4 * line_floats), shares(4 * stride), labels(4 * stride) {
        std::memset(line, 0, sizeof(float) * line_floats);
        std::memset(logits, 0, sizeof(float) * 4 * line_floats);
        std::memset(shares, 0, sizeof(float) * 4 * stride);
    }

    // The loss of row y of the labels of an image. Afterwards gradient(k) is that of the logits, as one of `j`'s
    // scores.
    double loss(long image, long y) {
        const long h = e.h, w = e.w, at = y / 4, j = y % 4;
        for (long k = 0; k < e.classes; ++k) {
            const float* own = e.scores + ((image * e.classes + k) * h + at) * w;
            const float *above = at > 0 ? own - w : own, *below = at + 1 < h ? own + w : own;
            float* to = line_of(k);
            for (long x = 0; x < w; ++x) to[x] = BEFORE[j] * above[x] + ITSELF[j] * own[x] + BEHIND[j] * below[x];
            to[-1] = to[0];
            to[w] = to[w - 1];
        }
        read_labels((image * e.height + y) * e.width);
        double loss = 0;
        for (int i = 0; i < 4; ++i)
            for (long x = 0; x < w; x += V) loss += of_vector(i, x);
        return loss;
    }

    // The gradient of the line of scores that the row was made of, [w]; it lies where the line was.
    const float* gradient(long k) {
        const long w = e.w;
        float* to = line_of(k);
        const auto g = [&](int i, long x) { return load(logits_of(i, k) + x); };
        // At the ends a score stands for the one that is missing, too.
        const float* ends[] = {logits_of(0, k), logits_of(1, k), logits_of(2, k) + w - 1, logits_of(3, k) + w - 1};
        const float first = BEFORE[0] * *ends[0] + BEFORE[1] * *ends[1];
        const float last = BEHIND[2] * *ends[2] + BEHIND[3] * *ends[3];
        for (long x = 0; x < w; x += V)
            store(to + x, ITSELF[0] * (g(0, x) + g(3, x)) + ITSELF[1] * (g(1, x) + g(2, x)) + BEFORE[0] * g(0, x + 1) +
                              BEFORE[1] * g(1, x + 1) + BEHIND[2] * g(2, x - 1) + BEHIND[3] * g(3, x - 1));
        to[0] += first;
        to[w - 1] += last;
        return to;
    }

  private:
    float* line_of(long k) { return line + k * stride + 1; }  // a pixel before it, V behind it
    float* logits_of(int i, long k) { return logits + (k * 4 + i) * stride + 1; }

    void read_labels(long offset) {
        for (long x = 0; x < e.width; ++x) {
            const int64_t label = e.labels[offset + x];
            const bool counts = label != e.ignored;
            require(!counts || (label >= 0 && label < e.classes), "a label is none of the classes");
            const long place = x % 4 * stride + x / 4;
            labels[place] = counts ? int32_t(label) : 0;
            shares[place] = !counts ? 0 : e.weights ? e.weights[offset + x] : 1;
        }
    }

    double of_vector(int i, long x) {
        const float* share = shares + i * stride + x;
        const int32_t* label = labels.data() + i * stride + x;
        vec most = splat(-INFINITY), sum = {}, own = {}, broken = {};
        for (long k = 0; k < e.classes; ++k) {
            const float* from = line_of(k) + x;
            const vec logit = BEFORE[i] * load(from - 1) + ITSELF[i] * load(from) + BEHIND[i] * load(from + 1);
            store(logits_of(i, k) + x, logit);
            most = maximum(most, logit);
            broken += logit * 0.0f;  // what is not finite stays so
        }
        for (int lane = 0; lane < V; ++lane) own[lane] = logits_of(i, label[lane])[x + lane];
        for (long k = 0; k < e.classes; ++k) {
            const vec power = exponential(load(logits_of(i, k) + x) - most);
            store(logits_of(i, k) + x, power);
            sum += power;
        }
        const vec weight = load(share), factor = weight / (sum + broken);
        for (long k = 0; k < e.classes; ++k) {
            float* to = logits_of(i, k) + x;
            store(to, load(to) * factor);
        }
        for (int lane = 0; lane < V; ++lane) logits_of(i, label[lane])[x + lane] -= share[lane];
        const vec losses = (logarithm(sum) + broken + (most - own)) * weight;
        double loss = 0;
        for (int lane = 0; lane < V; ++lane) loss += losses[lane];
        return loss;
    }

    const Entropy& e;
    const long stride, line_floats;
    const Floats line, logits, shares;
    std::vector<int32_t> labels;
};

inline void entropy(const Entropy& e, int threads) {
    const long h = e.h, w = e.w, plane = h * w, bands = (h + ENTROPY_ROWS - 1) / ENTROPY_ROWS;
    const long parts = e.images * bands, edge = e.classes * w;
    std::vector<double> losses(parts);
    std::vector<float> edges(2 * parts * edge);  // what a band adds to the row above it, and to that below
    pool->run(parts, threads, [&](long part) {
        const long image = part / bands, first = part % bands * ENTROPY_ROWS, end = std::min(h, first + ENTROPY_ROWS);
        float* dscores = e.dscores + image * e.classes * plane;
        for (long k = 0; k < e.classes; ++k)
            std::memset(dscores + k * plane + first * w, 0, sizeof(float) * (end - first) * w);
        EntropyRow row(e);
        for (long y = 4 * first; y < std::min<long>(e.height, 4 * end); ++y) {
            losses[part] += row.loss(image, y);
            const long j = y % 4, at = y / 4;
            for (long k = 0; k < e.classes; ++k) {
                const float* gradient = row.gradient(k);
                const auto add = [&](long to, float share) {
                    if (share == 0) return;
                    to = std::clamp(to, 0L, h - 1);
                    float* sum = to < first  ? edges.data() + 2 * part * edge + k * w
                                 : to >= end ? edges.data() + (2 * part + 1) * edge + k * w
                                             : dscores + k * plane + to * w;
                    for (long x = 0; x < w; ++x) sum[x] += share * gradient[x];
                };
                add(at - 1, BEFORE[j]);
                add(at, ITSELF[j]);
                add(at + 1, BEHIND[j]);
            }
        }
    });
    *e.loss = 0;
    for (long part = 0; part < parts; ++part) {
        *e.loss += losses[part];
        for (int side = 0; side < 2; ++side) {
            const long to = side ? (part % bands + 1) * ENTROPY_ROWS : part % bands * ENTROPY_ROWS - 1;
            if (to < 0 || to >= h) continue;
            const float* from = edges.data() + (2 * part + side) * edge;
            for (long k = 0; k < e.classes; ++k) {
                float* sum = e.dscores + (part / bands * e.classes + k) * plane + to * w;
                for (long x = 0; x < w; ++x) sum[x] += from[k * w + x];
            }
        }
    }
}

// Calls go<W>() with the widest vector that divides both numbers of channels.
template <class Go>
void with_width(long first, long second, const Go& go) {
    const auto fits = [&](long width) { return first % width == 0 && second % width == 0; };
    if (V >= 16 && fits(16)) return go(std::integral_constant<int, V >= 16 ? 16 : 4>());
    if (V >= 8 && fits(8)) return go(std::integral_constant<int, V >= 8 ? 8 : 4>());
    require(fits(4), "channels are no multiple of 4");
    go(std::integral_constant<int, 4>());
}

}  // namespace
