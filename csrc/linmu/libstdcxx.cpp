// Part of a wheel (LINMU_WHEEL): what this compiler takes from the C++ library, and that of manylinux_2_28 lacks.
#include <new>
#include <sstream>

template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

namespace std {
// Vectors call it.
[[noreturn]] void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
