// Where the visual tokens of a batch are, and the orders and windows they are visited in: linmu_ops.TokenLayout's
// planner, compiled. linmu_ops/reference/token_layout.py is the definition; the checks say the same words.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace linmu {

using Triple = std::array<int64_t, 3>;

// Raised whenever a plan changes meaning (VERSION in the reference).
inline constexpr int kPlanVersion = 1;
// Axes of a (T, H, W) block from slowest to fastest in the major scan of layer l, by l mod 4.
inline constexpr int kMajorAxes[4][3] = {{0, 1, 2}, {0, 2, 1}, {1, 2, 0}, {2, 1, 0}};

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream out;
  out << "TokenLayout: ";
  (out << ... << parts);
  throw std::invalid_argument(out.str());
}

inline std::string text(const Triple& t) {
  std::ostringstream out;
  out << '(' << t[0] << ", " << t[1] << ", " << t[2] << ')';
  return out.str();
}

// Calls f(canonical index) for each token of a (T, H, W) block in the major scan's order.
template <class F>
void for_each_major(const Triple& sizes, int mode, F&& f) {
  const Triple strides = {sizes[1] * sizes[2], sizes[2], 1};
  const int *axes = kMajorAxes[mode], a = axes[0], b = axes[1], c = axes[2];
  for (int64_t i = 0; i < sizes[a]; ++i)
    for (int64_t j = 0; j < sizes[b]; ++j)
      for (int64_t k = 0; k < sizes[c]; ++k) f(i * strides[a] + j * strides[b] + k * strides[c]);
}

// One dimension of a window partition. d = (c - shift) mod size counts along the rolled axis; a window is d / window,
// and `cuts` are the d at which one ends: multiples of the window and, where wrapped tokens are kept apart, size -
// shift.
struct WindowAxis {
  int64_t size, window, shift;
  std::vector<int64_t> cuts;

  WindowAxis(int64_t s, int64_t w, int64_t h, bool wrap_mask)
      : size(s), window(std::min(w, s)), shift(w >= s ? 0 : h % s) {
    for (int64_t d = window; d < s; d += window) cuts.push_back(d);
    if (wrap_mask && (s - shift) % window)
      cuts.insert(std::upper_bound(cuts.begin(), cuts.end(), s - shift), s - shift);
    if (cuts.empty() || cuts.back() != s) cuts.push_back(s);
  }
  int64_t coordinate(int64_t d) const { return d + shift < size ? d + shift : d + shift - size; }
};

struct WindowTable {
  std::vector<int32_t> tokens, offsets, coords;
  int64_t max_tokens = 0;
};

class Plan {
 public:
  Plan(const int64_t* blocks, int64_t num_blocks, const int64_t* positions, int64_t num_visual, int64_t batch_size,
       int64_t length)
      : batch_size_(batch_size), length_(length), positions_(positions, positions + num_visual) {
    if (batch_size < 0 || length < 0 || (length > 0 && batch_size > INT32_MAX / length))
      refuse("batch_size * length must be in 0..2**31 - 1, got ", batch_size, " * ", length);
    int64_t total = 0;
    for (int64_t i = 0; i < num_blocks; ++i) {
      const int64_t* b = blocks + 4 * i;
      const Block block{b[0], {b[1], b[2], b[3]}, total, fitting(b + 1, length)};
      if (block.row < 0 || block.row >= batch_size)
        refuse(name(i), " must be in a row of 0..", batch_size - 1, ", got row ", block.row);
      if (std::min({b[1], b[2], b[3]}) < 1) refuse(name(i), " must have sizes (T, H, W) >= 1, got ", text(block.sizes));
      if (block.tokens < 0) refuse(name(i), " must fit in length ", length, ", got (T, H, W) = ", text(block.sizes));
      total += block.tokens;
      blocks_.push_back(block);
    }
    if (total != num_visual) refuse("positions must have ", total, " entries, T*H*W per block, got ", num_visual);
    for (int64_t i = 0; i < num_visual; ++i)
      if (positions[i] < 0 || positions[i] >= length)
        refuse("positions must be in 0..", length - 1, ", got ", positions[i], " at index ", i);
    slots_ = positions_;
    for (const Block& block : blocks_) check_slots(block);
    check_spans();
  }

  int64_t batch_size() const { return batch_size_; }
  int64_t length() const { return length_; }
  int64_t num_visual() const { return static_cast<int64_t>(positions_.size()); }

  // mask (B, L): true at visual tokens. index (B, L): 1 + block from a block's first token to its last, else 0.
  void segments(bool* mask, int32_t* index) const {
    std::fill(mask, mask + batch_size_ * length_, false);
    std::fill(index, index + batch_size_ * length_, 0);
    for (size_t i = 0; i < blocks_.size(); ++i) {
      const int64_t *slots = first_slot(blocks_[i]), row = blocks_[i].row * length_, n = blocks_[i].tokens;
      for (int64_t k = 0; k < n; ++k) mask[row + slots[k]] = true;
      std::fill(index + row + slots[0], index + row + slots[n - 1] + 1, static_cast<int32_t>(i + 1));
    }
  }

  // order (B, L): the position visited at t. A block's tokens go, in major order, to the block's sorted slots.
  void scan_order(int mode, int32_t* order) const {
    if (mode < 0 || mode > 3) refuse("mode must be in 0..3, got ", mode);
    for (int64_t b = 0; b < batch_size_; ++b)
      for (int64_t t = 0; t < length_; ++t) order[b * length_ + t] = static_cast<int32_t>(t);
    for (const Block& block : blocks_) {
      const int64_t *slot = first_slot(block), *positions = positions_.data() + block.begin;
      int32_t* row = order + block.row * length_;
      for_each_major(block.sizes, mode, [&](int64_t token) { row[*slot++] = static_cast<int32_t>(positions[token]); });
    }
  }

  WindowTable window_table(const Triple& window, const Triple& shift, const Triple& image_window,
                           const Triple& image_shift, bool wrap_mask) const {
    check_window("window", window, "shift", shift);
    check_window("image_window", image_window, "image_shift", image_shift);
    WindowTable table;
    table.tokens.reserve(positions_.size());
    table.coords.reserve(positions_.size());
    table.offsets.push_back(0);
    for (const Block& block : blocks_) {
      const bool image = block.sizes[0] == 1;
      add_windows(block, image ? image_window : window, image ? image_shift : shift, wrap_mask, table);
    }
    return table;
  }

 private:
  struct Block {
    int64_t row;
    Triple sizes;           // T, H, W
    int64_t begin, tokens;  // its part of positions_ and slots_
  };

  static std::string name(int64_t i) { return std::string("blocks[").append(std::to_string(i)).append("]"); }

  // T*H*W, or -1 where it exceeds the length (compared by division: the product may not fit in 64 bits).
  static int64_t fitting(const int64_t* sizes, int64_t length) {
    int64_t tokens = 1;
    for (int axis = 0; axis < 3; ++axis) {
      if (sizes[axis] < 1 || tokens > length / sizes[axis]) return -1;
      tokens *= sizes[axis];
    }
    return tokens;
  }

  const int64_t* first_slot(const Block& block) const { return slots_.data() + block.begin; }

  void check_slots(const Block& block) {
    const auto begin = slots_.begin() + block.begin, end = begin + block.tokens;
    if (!std::is_sorted(begin, end)) std::sort(begin, end);
    const auto twice = std::adjacent_find(begin, end);
    if (twice != end)
      refuse(name(&block - blocks_.data()), " must name each position once, got position ", *twice, " twice");
  }

  void check_spans() const {
    std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> spans;  // row, first, block, last
    for (size_t i = 0; i < blocks_.size(); ++i) {
      const int64_t* slots = first_slot(blocks_[i]);
      spans.emplace_back(blocks_[i].row, slots[0], static_cast<int64_t>(i), slots[blocks_[i].tokens - 1]);
    }
    std::sort(spans.begin(), spans.end());
    for (size_t k = 1; k < spans.size(); ++k) {
      const auto& [row, first, i, last] = spans[k - 1];
      const auto& [row2, first2, j, last2] = spans[k];
      if (row == row2 && first2 <= last)
        refuse("blocks of a row must not overlap, got ", name(i), " at ", first, "..", last, " and ", name(j), " at ",
               first2, "..", last2, " in row ", row);
    }
  }

  static void check_window(const char* window_name, const Triple& window, const char* shift_name, const Triple& shift) {
    int64_t cells = 1;
    for (int64_t w : window) {
      if (w < 1) refuse(window_name, " must be three integers >= 1, got ", text(window));
      if (w > INT32_MAX || cells > INT32_MAX / (2 * w - 1))
        refuse(window_name, " must have (2T-1)(2H-1)(2W-1) < 2**31, got ", text(window));
      cells *= 2 * w - 1;
    }
    for (int64_t h : shift)
      if (h < 0) refuse(shift_name, " must be three integers >= 0, got ", text(shift));
  }

  void add_windows(const Block& block, const Triple& window, const Triple& shift, bool wrap_mask,
                   WindowTable& table) const {
    const auto axis = [&](int i) { return WindowAxis(block.sizes[i], window[i], shift[i], wrap_mask); };
    const WindowAxis t = axis(0), h = axis(1), w = axis(2);
    const int64_t* positions = positions_.data() + block.begin;
    const int64_t row = block.row * length_;
    int64_t t0 = 0;
    for (int64_t t1 : t.cuts) {
      int64_t h0 = 0;
      for (int64_t h1 : h.cuts) {
        int64_t w0 = 0;
        for (int64_t w1 : w.cuts) {
          for (int64_t i = t0; i < t1; ++i)
            for (int64_t j = h0; j < h1; ++j) {
              const int64_t line = (t.coordinate(i) * h.size + h.coordinate(j)) * w.size;
              const int64_t cell = (i % t.window * (2 * window[1] - 1) + j % h.window) * (2 * window[2] - 1);
              for (int64_t k = w0; k < w1; ++k) {
                table.tokens.push_back(static_cast<int32_t>(row + positions[line + w.coordinate(k)]));
                table.coords.push_back(static_cast<int32_t>(cell + k % w.window));
              }
            }
          const int64_t end = static_cast<int64_t>(table.tokens.size());
          table.max_tokens = std::max(table.max_tokens, end - table.offsets.back());
          table.offsets.push_back(static_cast<int32_t>(end));
          w0 = w1;
        }
        h0 = h1;
      }
      t0 = t1;
    }
  }

  int64_t batch_size_, length_;
  std::vector<Block> blocks_;
  std::vector<int64_t> positions_;  // per block, canonical t, y, x order
  std::vector<int64_t> slots_;      // per block, sorted
};

}  // namespace linmu
