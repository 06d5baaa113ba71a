// Included first in every C++ file of a wheel (LINMU_WHEEL), so that it asks for no symbol newer than glibc 2.28.
#pragma once

// glibc 2.29 gave these new versions that no longer set errno through a wrapper; the numbers are the same.
#if defined(__x86_64__)
#define LINMU_GLIBC "GLIBC_2.2.5"
#else
#define LINMU_GLIBC "GLIBC_2.17"
#endif
__asm__(".symver exp,exp@" LINMU_GLIBC);
__asm__(".symver log,log@" LINMU_GLIBC);
__asm__(".symver pow,pow@" LINMU_GLIBC);
__asm__(".symver exp2,exp2@" LINMU_GLIBC);
__asm__(".symver log2,log2@" LINMU_GLIBC);

// glibc 2.32's hint that a process has one thread, which libstdc++ reads: ours says "perhaps more".
extern "C" {
__attribute__((weak, visibility("hidden"))) char __libc_single_threaded = 0;
}
