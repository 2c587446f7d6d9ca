// Images into maps, weighted sums of maps, and resizings: one pass over memory each.
//
// Legend as in convolution.h.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

#include "convolution.h"

namespace {

typedef float vec4 __attribute__((vector_size(16), aligned(4), may_alias));
constexpr int SMALL_GATE_FACTOR = 4;  // of space.py

// An image as the caller has it, and its normalisation.
struct Image {
    const void* data;
    int64_t channel_step, row_step, column_step;  // in elements
    int32_t height, width, is_uint8;              // 0..255; otherwise float in 0..1
    float mean[3], std[3];
};

constexpr int SIDES = 3;  // of a node, that something arrives from: one scale finer, its own, one scale coarser

// One of the maps that are summed up, each multiplied by its weight.
struct Summand {
    Map map;
    float weight;
    int32_t halved;  // of half the height and width: resized bilinearly
};

inline void put(float* p, float x) { *p = x; }
#if defined(__AVX512BF16__)
inline void put(bfloat16* p, float x) {
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_set1_ps(x));
    std::memcpy(p, &rounded, sizeof *p);
}
#endif

// That it is a map with memory for all of its rows, of whole vectors of channels.
inline void check(const Map& map) {
    require(map.data && map.first == 0 && map.rows == map.h, "a map lacks rows");
    require(map.h > 0 && map.w > 0 && std::max(map.h, map.w) <= MOST_SIDE, "a map has no size that is supported");
    require(map.c > 0 && map.c <= MOST_CHANNELS && map.c % V == 0, "a map's channels are no whole vectors");
}

constexpr int STEM_STRIDE = 4;

// Calls work(x0, x1) for the stretches of a row of an image that are looked at: those of `needed`, the pixels of the
// stem's map, or all of it.
template <class Work>
void looked_at(const Pixels* needed, long y, const Map& out, const Work& work) {
    if (!needed) return work(0, int(out.w));
    stretches(needed, y / STEM_STRIDE, needed->w, [&](int x0, int x1) { work(STEM_STRIDE * x0, STEM_STRIDE * x1); });
}

// An image [3][height][width], float or uint8, to (x - mean) / std [out.h][out.w][3], with zeros right and below.
// False where a value is not finite.
template <class T, class Pixel>
bool normalize(const Image& image, const Map& out, int threads, const Pixels* needed) {
    require(image.data && out.data && out.c == 3 && out.rows == out.h, "an image has no map to go to");
    require(image.height > 0 && image.width > 0 && image.height <= out.h && image.width <= out.w &&
                std::max(out.h, out.w) <= MOST_SIDE,
            "an image does not fit into its map");
    float of_byte[3][256];  // a division for each pixel would take longer
    for (int channel = 0; channel < 3; ++channel)
        for (int value = 0; value < 256; ++value)
            of_byte[channel][value] = (float(value) / 255 - image.mean[channel]) / image.std[channel];
    std::atomic<bool> finite{true};
    pool->rows(out.h, threads, [&](long y) {
        float check = 0;
        looked_at(needed, y, out, [&](int x0, int x1) {
            T* to = static_cast<T*>(out.data) + y * out.w * 3;
            const int end = y < image.height ? std::min<int>(x1, image.width) : x0;
            for (int channel = 0; channel < 3 && x0 < end; ++channel) {
                const Pixel* plane = static_cast<const Pixel*>(image.data) + channel * image.channel_step;
                const Pixel* from = plane + y * image.row_step;
                const float mean = image.mean[channel], std = image.std[channel];
                for (int x = x0; x < end; ++x) {
                    if constexpr (sizeof(Pixel) == 1) {
                        put(to + 3 * x + channel, of_byte[channel][from[x * image.column_step]]);
                    } else {
                        const float value = from[x * image.column_step];
                        check += value * 0;  // NaN from NaN and from infinity
                        put(to + 3 * x + channel, (value - mean) / std);
                    }
                }
            }
            const int rest = std::max(end, x0);
            if (rest < x1) std::memset(to + 3 * rest, 0, sizeof(T) * 3 * (x1 - rest));
        });
        if (check != 0) finite = false;
    });
    return finite;
}

// Where resizing that averages over all pixels a smaller one stands for reads: a triangle around each output index.
struct Windows {
    int most = 0;                // indices that one reads
    std::vector<int> first;      // of each output index
    std::vector<float> weights;  // [out][most]; zeros beyond the last index

    Windows(int in, int out) : first(out) {
        const float scale = float(in) / float(out), support = std::max(scale, 1.0f);
        const auto end_of = [&](int i) { return std::min(int(scale * (float(i) + 0.5f) + support + 0.5f), in); };
        for (int i = 0; i < out; ++i) {
            first[i] = std::max(int(scale * (float(i) + 0.5f) - support + 0.5f), 0);
            most = std::max(most, end_of(i) - first[i]);
        }
        weights.assign(size_t(out) * most, 0.0f);
        for (int i = 0; i < out; ++i) {
            float* to = weights.data() + size_t(i) * most;
            const float center = scale * (float(i) + 0.5f);
            const int count = end_of(i) - first[i];
            float total = 0;
            for (int j = 0; j < count; ++j) {
                to[j] = std::max(0.0f, 1 - std::fabs((float(first[i] + j) - center + 0.5f) / support));
                total += to[j];
            }
            for (int j = 0; j < count; ++j) to[j] /= total;
        }
    }
    const float* of(long i) const { return weights.data() + i * most; }
};

// The same of an image that is looked at as height x width. A row of it is made first, [width][step]: three channels
// side by side, so that one multiplication weighs them all.
template <class T, class Pixel>
bool resize(const Image& image, int height, int width, const Map& out, int threads, const Pixels* needed) {
    require(image.data && out.data && out.c == 3 && out.rows == out.h, "an image has no map to go to");
    require(std::min({image.height, image.width, height, width}) > 0 && height <= out.h && width <= out.w &&
                std::max({out.h, out.w, image.height, image.width}) <= MOST_SIDE,
            "an image does not fit into its map");
    const Windows rows(image.height, height), columns(image.width, width);
    const bool side_by_side = image.channel_step == 1 && image.column_step == 3;
    const int step = side_by_side ? 3 : 4;
    const float range = sizeof(Pixel) == 1 ? 255.0f : 1.0f;
    const vec4 mean = {image.mean[0], image.mean[1], image.mean[2], 0};
    const vec4 scale = {1 / image.std[0], 1 / image.std[1], 1 / image.std[2], 0};
    std::atomic<bool> finite{true};
    pool->rows(out.h, threads, [&](long y) {
        const long size = long(step) * image.width, more = long(step) * columns.most + 4;  // zeros that are read, too
        float* line = reinterpret_cast<float*>(scratch(sizeof(float) * (size + more + image.width)));
        float* plane = line + size + more;
        vec4 check{};
        if (y < height) {
            std::fill_n(line, size + more, 0.0f);
            const int count = std::min(rows.most, image.height - rows.first[y]);
            const auto add = [&](const Pixel* from, long length, float* to) {  // the mean of rows
                for (int j = 0; j < count; ++j, from += image.row_step) {
                    const float weight = rows.of(y)[j] / range;
                    for (long i = 0; weight != 0 && i < length; ++i) to[i] += weight * float(from[i]);
                }
            };
            const Pixel* top = static_cast<const Pixel*>(image.data) + rows.first[y] * image.row_step;
            if (side_by_side) add(top, size, line);
            for (int channel = 0; channel < 3 && !side_by_side; ++channel, top += image.channel_step) {
                std::fill_n(plane, image.width, 0.0f);
                if (image.column_step == 1) {
                    add(top, image.width, plane);
                } else {
                    for (int j = 0; j < count; ++j)
                        for (int x = 0; x < image.width; ++x)
                            plane[x] += rows.of(y)[j] / range * float(top[j * image.row_step + x * image.column_step]);
                }
                for (int x = 0; x < image.width; ++x) line[4L * x + channel] = plane[x];
            }
        }
        looked_at(needed, y, out, [&](int x0, int x1) {
            T* to = static_cast<T*>(out.data) + y * out.w * 3;
            const int end = y < height ? std::min(x1, width) : x0;
            for (int x = x0; x < end; ++x) {
                const float* from = line + long(step) * columns.first[x];
                const float* weight = columns.of(x);
                vec4 value{};
                for (int j = 0; j < columns.most; ++j)
                    value += weight[j] * *reinterpret_cast<const vec4*>(from + long(step) * j);
                check += value * 0;
                value = (value - mean) * scale;
                for (int channel = 0; channel < 3; ++channel) put(to + 3 * x + channel, value[channel]);
            }
            const int rest = std::max(end, x0);
            if (rest < x1) std::memset(to + 3 * rest, 0, sizeof(T) * 3 * (x1 - rest));
        });
        if (!(check[0] + check[1] + check[2] == 0)) finite = false;
    });
    return finite;
}

// The image as it is looked at, height x width, normalised; with `needed` only what these pixels of the stem's map read,
// which are given with those around them.
template <class T>
bool normalized(const Image& image, int height, int width, const Map& out, int threads,
                const Pixels* needed = nullptr) {
    require(!needed || (needed->h * STEM_STRIDE == out.h && needed->w * STEM_STRIDE == out.w),
            "an image has pixels of another map");
    if (height == image.height && width == image.width)
        return (image.is_uint8 ? normalize<T, uint8_t> : normalize<T, float>)(image, out, threads, needed);
    return (image.is_uint8 ? resize<T, uint8_t> : resize<T, float>)(image, height, width, out, threads, needed);
}

// That `pixels`, if there are any, are those of this map.
inline void check(const Pixels* pixels, const Map& map) {
    require(!pixels || (pixels->h == map.h && pixels->w == map.w), "a map has pixels of another one");
}

// Eq. 5 at a node: out = sum of weight * map over the summands, of which one may be halved, in one pass. With `pixels`
// only these are written; `out` may be one of the summands.
template <class T>
void assemble(const Summand* summands, int count, const Map& out, bool relu, int threads,
              const Pixels* pixels = nullptr) {
    check(out), check(pixels, out);
    require(count > 0 && count <= SIDES, "a sum has no summand, or too many");
    for (int i = 0, halves = 0; i < count; ++i) {
        const Map& map = summands[i].map;
        const int factor = summands[i].halved ? 2 : 1;
        check(map);
        require(map.c == out.c && map.h * factor == out.h && map.w * factor == out.w, "a sum has maps of other sizes");
        halves += summands[i].halved ? 1 : 0;
        require(halves <= 1, "a sum has two halved maps");
    }
    const int c = out.c, w = out.w;
    const vec low = splat(relu ? 0.0f : -INFINITY);
    pool->rows(out.h, threads, [&](long y) {
        T* to = static_cast<T*>(out.data) + y * w * c;
        const T* full[SIDES];
        float weight[SIDES];
        int fulls = 0;
        const T *a = nullptr, *b = nullptr;  // rows of the arrival of half the size
        vec wa{}, wb{};
        for (int i = 0; i < count; ++i) {
            const T* from = static_cast<const T*>(summands[i].map.data);
            if (!summands[i].halved) {
                full[fulls] = from + y * w * c;
                weight[fulls++] = summands[i].weight;
                continue;
            }
            const long near = y / 2, far = std::clamp(near + (y % 2 ? 1L : -1L), 0L, long(out.h / 2 - 1));
            a = from + near * (w / 2) * c, b = from + far * (w / 2) * c;
            wa = splat(0.75f * summands[i].weight), wb = splat(0.25f * summands[i].weight);
        }
        float* const row = a ? reinterpret_cast<float*>(scratch(sizeof(float) * (w / 2) * c)) : nullptr;
        stretches(pixels, y, w, [&](int x0, int x1) {
            if (row) {  // both rows as one, resized in height: [w/2][c]
                const int first = std::max(0, x0 / 2 - 1), end = std::min(w / 2, (x1 - 1) / 2 + 2);
                for (int j = first * c; j < end * c; j += V) store(row + j, wa * load(a + j) + wb * load(b + j));
            }
            for (int x = x0; x < x1; ++x) {
                const float *near = nullptr, *far = nullptr;
                if (row) {
                    near = row + x / 2 * c;
                    far = row + std::clamp(x / 2 + (x % 2 ? 1 : -1), 0, w / 2 - 1) * c;
                }
                for (int i = x * c; i < (x + 1) * c; i += V) {
                    vec sum = {};
                    for (int j = 0; j < fulls; ++j) sum += splat(weight[j]) * load(full[j] + i);
                    if (row) sum += splat(0.75f) * load(near + i - x * c) + splat(0.25f) * load(far + i - x * c);
                    sum = maximum(low, sum);
                    store(to + i, sum);
                }
            }
        });
    });
}

// `Running.filled` (model/places.py), in place: `around`, of the rows first..end of a map, become the mean of those
// pixels of `runs` that are `reach` away, or nearer.
template <class T>
void fill(const Map& map, const Mask& runs, const Pixels& around, int reach, int first, int end, int threads) {
    check(&around, map);
    require(runs.h == map.h && runs.w == map.w && map.c % V == 0, "a map has other pixels that run");
    require(std::max(0, first - reach) >= map.first && std::min(map.h, end + reach) <= map.first + map.rows,
            "a map lacks rows");
    require(reach > 0 && reach <= MOST_TAPS / 2, "a convolution reads too far");
    pool->rows(std::max(0, end - first), threads, [&](long line) {
        const int y = first + int(line), c = map.c;
        for (long i = around.rows[y]; i < around.rows[y + 1]; ++i) {
            const int x = around.at[i] - y * map.w;
            const T* near[MOST_TAPS * MOST_TAPS];
            int count = 0;
            for (int row = std::max(0, y - reach); row <= std::min(map.h - 1, y + reach); ++row)
                for (int column = std::max(0, x - reach); column <= std::min(map.w - 1, x + reach); ++column)
                    if (runs.row(row)[column]) near[count++] = row_of<T>(map, row) + long(column) * c;
            T* to = const_cast<T*>(row_of<T>(map, y)) + long(x) * c;
            const vec share = splat(1.0f / float(std::max(count, 1)));
            for (int j = 0; j < c; j += V) {
                vec sum{};
                for (int n = 0; n < count; ++n) sum += load(near[n] + j);
                store(to + j, share * sum);
            }
        }
    });
}

// Where bilinear resizing by 1/step (corners not aligned) reads for an output index.
struct Between {
    int near, far;
    float weight;  // of far
    Between(int index, float step, int size) {
        float at = std::max(0.0f, (index + 0.5f) * step - 0.5f);
        near = std::min(int(at), size - 1);
        far = std::min(near + 1, size - 1);
        weight = at - near;
    }
};

// Pixels of a map become what another look at the image had there, in another size: bilinear. One is `step` of that
// look's.
template <class T>
void enlarge_around(const Map& map, const Pixels& around, const Map& known, float step_y, float step_x, int first,
                    int end, int threads) {
    check(&around, map);
    require(known.c == map.c && map.c % V == 0 && known.first == 0 && known.rows == known.h,
            "the map of a first look is another one");
    require(first >= map.first && end <= map.first + map.rows, "a map lacks rows");
    pool->rows(std::max(0, end - first), threads, [&](long line) {
        const int y = first + int(line), c = map.c;
        const Between rows(y, step_y, known.h);
        const T *top = row_of<T>(known, rows.near), *bottom = row_of<T>(known, rows.far);
        const vec lower = splat(rows.weight), upper = splat(1 - rows.weight);
        for (long i = around.rows[y]; i < around.rows[y + 1]; ++i) {
            const int x = around.at[i] - y * map.w;
            const Between columns(x, step_x, known.w);
            const vec right = splat(columns.weight), left = splat(1 - columns.weight);
            T* to = const_cast<T*>(row_of<T>(map, y)) + long(x) * c;
            for (int j = 0; j < c; j += V) {
                const long a = long(columns.near) * c + j, b = long(columns.far) * c + j;
                store(to + j, upper * (left * load(top + a) + right * load(top + b)) +
                                  lower * (left * load(bottom + a) + right * load(bottom + b)));
            }
        }
    });
}

// The small gate's view of a map: a quarter of the size, at least one pixel (`shrink` of model/gate.py).
template <class T>
void shrink(const Map& in, const Map& out, int threads) {
    check(in), check(out);
    require(in.c == out.c && out.h <= in.h && out.w <= in.w, "a map is shrunk to another shape");
    const int c = in.c;
    const bool whole = std::min(in.h, in.w) >= SMALL_GATE_FACTOR;
    const float step_y = whole ? SMALL_GATE_FACTOR : float(in.h) / out.h;
    const float step_x = whole ? SMALL_GATE_FACTOR : float(in.w) / out.w;
    pool->run(out.h, threads, [&](long y) {
        const Between rows(int(y), step_y, in.h);
        const T *top = row_of<T>(in, rows.near), *bottom = row_of<T>(in, rows.far);
        T* to = static_cast<T*>(out.data) + y * out.w * c;
        for (int x = 0; x < out.w; ++x, to += c) {
            const Between columns(x, step_x, in.w);
            const vec lower = splat(rows.weight), upper = splat(1 - rows.weight);
            const vec right = splat(columns.weight), left = splat(1 - columns.weight);
            for (int i = 0; i < c; i += V) {
                const long a = long(columns.near) * c + i, b = long(columns.far) * c + i;
                store(to + i, upper * (left * load(top + a) + right * load(top + b)) +
                                  lower * (left * load(bottom + a) + right * load(bottom + b)));
            }
        }
    });
}

// A step of a glance (`Decoder.glance`): out = the means of windows of `factor` times `factor` pixels of a map, of
// which those at the edges may be smaller, plus each pixel of `coarse` as four, or as one if it has this size. Either
// may be null. With `pixels` only these are written.
template <class T>
void glance(const Map* in, const Map* coarse, int factor, const Map& out, int threads, const Pixels* pixels = nullptr) {
    check(out), check(pixels, out);
    const int c = out.c, half = coarse && coarse->h == out.h && coarse->w == out.w ? 1 : 2;
    if (in) {
        check(*in);
        require(in->c == c && out.h == (in->h + factor - 1) / factor && out.w == (in->w + factor - 1) / factor,
                "a map is glanced at in another shape");
    }
    if (coarse) {
        check(*coarse);
        require(coarse->c == c && coarse->h * half >= out.h && coarse->w * half >= out.w,
                "a glance has maps of other sizes");
    }
    pool->run(out.h, threads, [&](long y) {
        const int top = int(y) * factor, bottom = in ? std::min(top + factor, int(in->h)) : top;
        stretches(pixels, y, out.w, [&](int x0, int x1) {
            T* to = static_cast<T*>(out.data) + (y * out.w + x0) * c;
            for (int x = x0; x < x1; ++x, to += c) {
                const int left = x * factor, right = in ? std::min(left + factor, int(in->w)) : left;
                const vec share = splat(in ? 1.0f / float((bottom - top) * (right - left)) : 0.0f);
                for (int i = 0; i < c; i += V) {
                    vec sum{};
                    for (int row = top; row < bottom; ++row)
                        for (int column = left; column < right; ++column)
                            sum += load(row_of<T>(*in, row) + long(column) * c + i);
                    sum *= share;
                    if (coarse) sum += load(row_of<T>(*coarse, int(y) / half) + long(x / half) * c + i);
                    store(to + i, sum);
                }
            }
        });
    });
}

// Scores, float [h,w,c], to logits [classes][4h][4w], of which `height` x `width` are kept: bilinear, factor 4.
void enlarge(const Map& in, int classes, float* out, int height, int width, int threads) {
    check(in);
    require(out && classes > 0 && classes <= in.c, "there are fewer scores than classes");
    require(height > 0 && width > 0 && height <= 4 * in.h && width <= 4 * in.w, "logits are larger than their scores");
    const int w = in.w, c = in.c;
    const vec4 left = {0.375f, 0.125f, 0, 0}, right = {0, 0, 0.125f, 0.375f};
    const vec4 middle = {0.625f, 0.875f, 0.875f, 0.625f};
    pool->rows(height, threads, [&](long y) {
        const Between rows(int(y), 0.25f, in.h);
        const vec upper = splat(1 - rows.weight), lower = splat(rows.weight);
        const float *a = row_of<float>(in, rows.near), *b = row_of<float>(in, rows.far);
        float* line = reinterpret_cast<float*>(scratch(sizeof(float) * (long(w) * c + w + 2 + 4 * w)));
        float* plane = line + long(w) * c;  // one class, with a pixel more at each end
        float* resized = plane + w + 2;
        for (long j = 0; j < long(w) * c; j += V) store(line + j, upper * load(a + j) + lower * load(b + j));
        for (int k = 0; k < classes; ++k) {
            for (int x = 0; x < w; ++x) plane[x + 1] = line[long(x) * c + k];
            plane[0] = plane[1];
            plane[w + 1] = plane[w];
            float* to = out + (long(k) * height + y) * width;
            float* target = width == 4 * w ? to : resized;
            for (int x = 0; x < w; ++x) {
                vec4* four = reinterpret_cast<vec4*>(target + 4 * x);
                *four = left * plane[x] + middle * plane[x + 1] + right * plane[x + 2];
            }
            if (target != to) std::memcpy(to, target, sizeof(float) * width);
        }
    });
}

// Which scores a pixel's logits are made of: those of the size at which the image was looked at, bilinear by factor 4
// from the scores, then bilinear to the image's own size.
struct Taps {
    static constexpr int MOST = 4;
    int first = 0, count = 0;
    float weight[MOST] = {};

    static std::vector<Taps> of(int scores, int seen, int own) {
        std::vector<Taps> found(own);
        for (int i = 0; i < own; ++i) {
            const Between at(i, float(seen) / float(own), seen);
            found[i].first = Between(at.near, 0.25f, scores).near;
            for (const auto& [index, share] : {std::pair(at.near, 1 - at.weight), std::pair(at.far, at.weight)}) {
                const Between from(index, 0.25f, scores);
                found[i].weight[from.near - found[i].first] += share * (1 - from.weight);
                found[i].weight[from.far - found[i].first] += share * from.weight;
            }
            for (int k = 0; k < MOST; ++k)
                if (found[i].weight[k] != 0) found[i].count = k + 1;
        }
        return found;
    }
};

// That scores [h,w,c] are those of so many classes, and of an image that is looked at as seen_h x seen_w.
inline void check(const Map& in, int classes, int seen_h, int seen_w, const void* out, int height, int width) {
    check(in);
    require(out && classes > 0 && classes <= in.c, "there are fewer scores than classes");
    require(std::min({seen_h, seen_w, height, width}) > 0 && seen_h <= 4 * in.h && seen_w <= 4 * in.w,
            "logits are larger than their scores");
}

// A row of scores as the pixels of a row of the image read them, [w,c].
inline void blend(const Map& in, const Taps& rows, float* line) {
    const long length = long(in.w) * in.c;
    for (long j = 0; j < length; j += V) {
        vec sum{};
        for (int k = 0; k < rows.count; ++k) sum += splat(rows.weight[k]) * load(row_of<float>(in, rows.first + k) + j);
        store(line + j, sum);
    }
}

// Scores, float [h,w,c], to logits [classes][height][width] of an image that was looked at as seen_h x seen_w.
void enlarge_twice(const Map& in, int classes, int seen_h, int seen_w, float* out, int height, int width, int threads) {
    check(in, classes, seen_h, seen_w, out, height, width);
    const std::vector<Taps> rows = Taps::of(in.h, seen_h, height), columns = Taps::of(in.w, seen_w, width);
    pool->rows(height, threads, [&](long y) {
        const int w = in.w, c = in.c;
        float* line = reinterpret_cast<float*>(scratch(sizeof(float) * (long(w) * c + w + Taps::MOST)));
        float* plane = line + long(w) * c;  // one class
        blend(in, rows[y], line);
        std::fill_n(plane + w, Taps::MOST, 0.0f);
        for (int k = 0; k < classes; ++k) {
            for (int x = 0; x < w; ++x) plane[x] = line[long(x) * c + k];
            float* to = out + (long(k) * height + y) * width;
            for (int x = 0; x < width; ++x) {
                const float* from = plane + columns[x].first;
                float sum = 0;
                for (int j = 0; j < Taps::MOST; ++j) sum += columns[x].weight[j] * from[j];
                to[x] = sum;
            }
        }
    });
}

inline int most_likely(const float* score, int classes) {
    int best = 0;
    for (int k = 1; k < classes; ++k) best = score[k] > score[best] ? k : best;
    return best;
}

// The most likely class of each pixel, [height][width], of the same logits, which are not written. False where scores
// are not finite. Logits are means of some scores: where these have one most likely class, so has the pixel.
bool label(const Map& in, int classes, int seen_h, int seen_w, uint8_t* out, int height, int width, int threads) {
    check(in, classes, seen_h, seen_w, out, height, width);
    const std::vector<Taps> rows = Taps::of(in.h, seen_h, height), columns = Taps::of(in.w, seen_w, width);
    const int w = in.w, c = in.c;
    constexpr int SEVERAL = -1;
    std::vector<int16_t> coarse(size_t(in.h) * w);
    std::atomic<bool> finite{true};
    pool->rows(in.h, threads, [&](long y) {
        float check = 0;
        for (int x = 0; x < w; ++x) {
            const float* score = row_of<float>(in, int(y)) + long(x) * c;
            for (int k = 0; k < classes; ++k) check += score[k] * 0;
            coarse[y * w + x] = int16_t(most_likely(score, classes));
        }
        if (check != 0) finite = false;
    });
    if (!finite) return false;
    std::vector<int> until(w, 0);  // of each column of scores: the pixels of the image that read none beyond it
    for (const Taps& taps : columns) ++until[taps.first + taps.count - 1];
    std::partial_sum(until.begin(), until.end(), until.begin());
    pool->rows(height, threads, [&](long y) {
        const size_t floats = (long(w) + 1) * c;
        float* line = reinterpret_cast<float*>(scratch(sizeof(float) * floats + sizeof(int16_t) * (w + 1)));
        float* score = line + long(w) * c;
        int16_t* alike = reinterpret_cast<int16_t*>(line + floats);  // the class of all rows that are read
        const int16_t* above = coarse.data() + long(rows[y].first) * w;
        uint8_t* to = out + y * width;
        bool blended = false;
        std::copy_n(above, w, alike);
        for (int k = 1; k < rows[y].count; ++k)
            for (int x = 0; x < w; ++x) alike[x] = above[long(k) * w + x] == alike[x] ? alike[x] : SEVERAL;
        alike[w] = SEVERAL;
        for (int x = 0, last = 0; x < width;) {
            const Taps& taps = columns[x];
            const int found = alike[taps.first];
            last = std::max(last, taps.first);
            while (found != SEVERAL && alike[last + 1] == found) ++last;  // the columns that are alike
            const int stop = found == SEVERAL ? x : until[last];
            if (stop > x) {
                std::memset(to + x, found, stop - x);
                x = stop;
                continue;
            }
            if (!std::exchange(blended, true)) blend(in, rows[y], line);
            const float* from = line + long(taps.first) * c;
            for (int i = 0; i < c; i += V) {
                vec sum{};
                for (int k = 0; k < taps.count; ++k) sum += splat(taps.weight[k]) * load(from + long(k) * c + i);
                store(score + i, sum);
            }
            to[x++] = uint8_t(most_likely(score, classes));
        }
    });
    return true;
}

}  // namespace
