//! `primes N`: counts the primes below N. A plain program with rayon, which knows nothing of wrun.

use rayon::iter::{IntoParallelIterator, ParallelIterator};

fn main() {
    let below: u64 = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(1000);
    let count = (2..below).into_par_iter().filter(|number| is_prime(*number)).count();
    println!("{count} primes below {below}, found by {} threads", rayon::current_num_threads());
}

fn is_prime(number: u64) -> bool {
    (2..=number.isqrt()).all(|divisor| !number.is_multiple_of(divisor))
}
