// Which pixels of a map are computed, where places of the image have left the network (model/places.py).
//
// Maps keep their size in memory: only the pixels that run are written, and beside them those that a convolution or a
// resizing reads beyond them. Legend as in convolution.h.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <optional>
#include <vector>

namespace {

// A flag for each pixel of a map, or for each place of an image.
struct Mask {
    int h, w;
    std::vector<char> flags;

    Mask(int h, int w, char flag) : h(h), w(w), flags(size_t(h) * w, flag) {}
    char* row(int y) { return flags.data() + long(y) * w; }
    const char* row(int y) const { return flags.data() + long(y) * w; }
    bool any() const { return std::find(flags.begin(), flags.end(), 1) != flags.end(); }
    bool all() const { return std::find(flags.begin(), flags.end(), 0) == flags.end(); }
};

// Where both of two masks of a size have a flag; or the first one has it and the other one lacks it.
inline Mask both(Mask one, const Mask& other, bool has = true) {
    for (size_t i = 0; i < one.flags.size(); ++i) one.flags[i] &= other.flags[i] ^ char(!has);
    return one;
}
inline Mask either(Mask one, const Mask& other) {
    for (size_t i = 0; i < one.flags.size(); ++i) one.flags[i] |= other.flags[i];
    return one;
}

// The flags of places as those of h x w pixels, of which a place has side x side.
inline Mask pixels_of(const Mask& places, int side, int h, int w) {
    Mask mask(h, w, 0);
    for (int y = 0; y < h; ++y) {
        char* row = mask.row(y);
        if (y % side) std::copy_n(mask.row(y - 1), w, row);
        else
            for (int x = 0; x < w; x += side)
                std::fill_n(row + x, std::min(side, w - x), places.row(y / side)[x / side]);
    }
    return mask;
}

// to[i] |= from[i]
inline void join(char* __restrict to, const char* __restrict from, int count) {
    for (int i = 0; i < count; ++i) to[i] |= from[i];
}

// The pixels that are `reach` away from one with a flag, or nearer.
inline Mask grown(const Mask& mask, int reach) {
    Mask wide(mask);
    for (int y = 0; y < mask.h; ++y)
        for (int by = 1; by <= std::min(reach, mask.w - 1); ++by) {
            join(wide.row(y) + by, mask.row(y), mask.w - by);
            join(wide.row(y), mask.row(y) + by, mask.w - by);
        }
    Mask out(wide);
    for (int y = 0; y < mask.h; ++y)
        for (int from = std::max(0, y - reach); from < std::min(mask.h, y + reach + 1); ++from)
            if (from != y) join(out.row(y), wide.row(from), mask.w);
    return out;
}

// The pixels of a map of half the size that bilinear resizing reads for those of a mask.
inline Mask halved(const Mask& mask) {
    Mask out(mask.h / 2, mask.w / 2, 0);
    std::vector<char> rows(size_t(mask.w) + 2);  // those of the four rows that one is read for
    for (int y = 0; y < out.h; ++y) {
        std::fill(rows.begin(), rows.end(), 0);
        for (int from = std::max(0, 2 * y - 1); from < std::min(mask.h, 2 * y + 3); ++from)
            join(rows.data() + 1, mask.row(from), mask.w);
        for (int x = 0; x < out.w; ++x) {
            const char* four = rows.data() + 2 * x;
            out.row(y)[x] = four[0] | four[1] | four[2] | four[3];
        }
    }
    return out;
}

// The pixels of a mask, row by row.
struct Pixels {
    int h, w;
    std::vector<int32_t> at;  // y * w + x, ascending
    std::vector<long> rows;   // [h+1]: where in `at` those of each row begin

    explicit Pixels(const Mask& mask) : h(mask.h), w(mask.w), rows(mask.h + 1, 0) {
        at.reserve(std::count(mask.flags.begin(), mask.flags.end(), 1));
        for (int y = 0; y < h; ++y) {
            const char* row = mask.row(y);
            const long before = rows[std::max(0, y - 1)];
            if (y > 0 && !std::memcmp(row, mask.row(y - 1), w)) {  // places have many rows that are alike
                for (long i = before; i < rows[y]; ++i) at.push_back(at[i] + w);
            } else {
                for (const char *from = row, *end = row + w; from < end;) {
                    from = static_cast<const char*>(std::memchr(from, 1, end - from));
                    if (!from) break;
                    for (; from < end && *from; ++from) at.push_back(y * w + int(from - row));
                }
            }
            rows[y + 1] = long(at.size());
        }
    }

    // How many of those from number i on, but no further than `end`, stand side by side in a row.
    int stretch(long i, long end) const {
        const long limit = std::min<long>(end, i + w - at[i] % w);
        long next = i + 1;
        while (next < limit && at[next] == at[next - 1] + 1) ++next;
        return int(next - i);
    }
};

// Calls work(x0, x1) for the stretches of a row of w pixels; all of it where there are no `pixels`.
template <class Work>
void stretches(const Pixels* pixels, long y, int w, const Work& work) {
    if (!pixels) return work(0, w);
    for (long i = pixels->rows[y]; i < pixels->rows[y + 1];) {
        const int length = pixels->stretch(i, pixels->rows[y + 1]), x0 = int(pixels->at[i] - y * w);
        work(x0, x0 + length);
        i += length;
    }
}

// Places of an image of padded size [height, width] that are still in, and their pixels at each stride.
class Running {
  public:
    struct Area {
        Mask mask;
        Pixels pixels;
        std::map<int, Pixels> around;  // what does not run: by how far away it is at most
    };

    Running(Mask places, int side, int height, int width)
        : places(std::move(places)), side(side), height(height), width(width) {}

    float share() const {
        return float(std::count(places.flags.begin(), places.flags.end(), 1)) / float(places.flags.size());
    }

    // Not for several threads at once.
    Area& area(int stride) {
        auto found = areas.find(stride);
        if (found == areas.end()) {
            const int h = (height + stride - 1) / stride, w = (width + stride - 1) / stride;
            Mask mask = pixels_of(places, side / stride, h, w);
            Pixels pixels(mask);
            found = areas.insert({stride, Area{std::move(mask), std::move(pixels), {}}}).first;
        }
        return found->second;
    }
    const Pixels& around(int stride, int reach) {
        Area& here = area(stride);
        auto found = here.around.find(reach);
        if (found == here.around.end())
            found = here.around.insert({reach, Pixels(both(grown(here.mask, reach), here.mask, false))}).first;
        return found->second;
    }

    const Mask places;

  private:
    const int side, height, width;
    std::map<int, Area> areas;
};

}  // namespace
