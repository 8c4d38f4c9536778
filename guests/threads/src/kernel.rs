//! What is computed to see how fast that is: the same source here, in the guest `kernels`, and in the bench that runs it
//! natively. None of it needs a stack in memory, so that a bare engine can call it from several threads; what can be is
//! computed two at a time, as the native compiler does by itself.

#![allow(unsafe_code, reason = "exported by name, for a bare engine")]

/// Adds up numbers that depend on each other's bits: there is no formula for it.
#[unsafe(no_mangle)]
#[cfg_attr(target_family = "wasm", target_feature(enable = "simd128"))]
pub(crate) extern "C" fn kernel_sum(start: u64, end: u64) -> u64 {
    let mut sum = 0u64;
    let mut number = start;
    while number < end {
        sum = sum.wrapping_add(number ^ (number >> 3));
        number += 1;
    }
    sum
}

/// Replaces numbers by what depends on them.
///
/// # Safety
///
/// So many of them lie there, and nobody else reads or writes them meanwhile.
#[unsafe(no_mangle)]
#[cfg_attr(target_family = "wasm", target_feature(enable = "simd128"))]
pub(crate) unsafe extern "C" fn kernel_map(numbers: *mut f64, count: usize) {
    let mut index = 0;
    while index < count {
        // SAFETY: as the caller says
        unsafe {
            let number = numbers.add(index);
            *number = (*number).sqrt() * 1.000_001 + 0.5;
        }
        index += 1;
    }
}

/// Draws rows of the Mandelbrot set, and answers how many steps that took.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn kernel_mandelbrot(size: u32, first: u32, last: u32, most: u32) -> u64 {
    let mut steps = 0u64;
    let mut row = first;
    while row < last {
        let mut column = 0;
        while column < size {
            let real = f64::from(column) / f64::from(size) * 3.0 - 2.0;
            let imaginary = f64::from(row) / f64::from(size) * 2.0 - 1.0;
            let (mut x, mut y, mut step) = (0.0f64, 0.0f64, 0u32);
            while step < most && x * x + y * y <= 4.0 {
                let next = x * x - y * y + real;
                y = 2.0 * x * y + imaginary;
                x = next;
                step += 1;
            }
            steps += u64::from(step);
            column += 1;
        }
        row += 1;
    }
    steps
}

/// Calls itself.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn kernel_fib(n: u32) -> u32 {
    if n < 2 { n } else { kernel_fib(n - 1) + kernel_fib(n - 2) }
}
