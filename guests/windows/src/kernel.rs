//! What the guests compute, which benches compile for the host, too.
//!
//! In a guest it is compiled with the vectors of WebAssembly, as the host's compiler uses those that every x86-64 has.

/// How many bytes are looked at at once.
const LANES: usize = 32;

/// Lines, words and bytes, as `wc` counts them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// How many ends of lines there are.
    pub lines: u64,
    /// How many runs of other bytes than white space there are.
    pub words: u64,
    /// How many bytes there are.
    pub bytes: u64,
}

/// Counts the lines, words and bytes of a text.
#[must_use]
#[cfg_attr(target_arch = "wasm32", target_feature(enable = "simd128"))]
pub fn count(text: &[u8]) -> Counts {
    let Some((first, rest)) = text.split_first() else { return Counts::default() };
    // a word begins where a space is followed by something else
    let mut counts =
        Counts { lines: u64::from(*first == b'\n'), words: u64::from(!is_space(*first)), bytes: text.len() as u64 };
    let before = &text[..rest.len()];
    // sums of bytes, which are emptied before they overflow
    for (before, rest) in before.chunks(LANES * 255).zip(rest.chunks(LANES * 255)) {
        let (mut lines, mut words) = ([0u8; LANES], [0u8; LANES]);
        let (whole, last) = rest.as_chunks::<LANES>();
        let (whole_before, last_before) = before.as_chunks::<LANES>();
        for (before, rest) in whole_before.iter().zip(whole) {
            for lane in 0..LANES {
                lines[lane] += u8::from(rest[lane] == b'\n');
                words[lane] += u8::from(is_space(before[lane]) & !is_space(rest[lane]));
            }
        }
        for (lane, (before, rest)) in last_before.iter().zip(last).enumerate() {
            lines[lane] += u8::from(*rest == b'\n');
            words[lane] += u8::from(is_space(*before) & !is_space(*rest));
        }
        counts.lines += lines.iter().map(|lane| u64::from(*lane)).sum::<u64>();
        counts.words += words.iter().map(|lane| u64::from(*lane)).sum::<u64>();
    }
    counts
}

#[inline]
fn is_space(byte: u8) -> bool {
    (byte == b' ') | (byte.wrapping_sub(b'\t') < 5)
}

/// Blurs a part of a picture of one byte a pixel: each pixel becomes the mean of the nine around it, where those beyond a
/// border are as the border is.
///
/// `around` are the picture's bytes from `start` on; `to` are those that the pixels from `first` on become, and what they
/// need of the picture must be within `around`.
///
/// # Panics
/// When it is not.
#[cfg_attr(target_arch = "wasm32", target_feature(enable = "simd128"))]
pub fn blur(around: &[u8], start: usize, (width, height): (usize, usize), first: usize, to: &mut [u8]) {
    let end = first + to.len();
    let mut at = first;
    while at < end {
        let (x, y) = (at % width, at / width);
        let count = (width - x).min(end - at);
        let line = |y: usize, from: usize, to: usize| &around[y * width + from - start..y * width + to - start];
        let lines = [y.saturating_sub(1), y, (y + 1).min(height - 1)];
        let to = &mut to[at - first..at - first + count];
        // those at the borders of the picture one by one, the rest at once
        let (from, until) = (x.max(1), (x + count).min(width - 1));
        if from < until {
            let [above, same, below] = lines.map(|y| line(y, from - 1, until + 1));
            let inner = &mut to[from - x..until - x];
            for (i, to) in inner.iter_mut().enumerate() {
                let sum = |line: &[u8]| u16::from(line[i]) + u16::from(line[i + 1]) + u16::from(line[i + 2]);
                *to = mean(sum(above) + sum(same) + sum(below));
            }
        }
        for border in [0, width - 1] {
            if (x..x + count).contains(&border) {
                let columns = [border.saturating_sub(1), border, (border + 1).min(width - 1)];
                let sum = lines.iter().flat_map(|y| columns.map(|x| u16::from(line(*y, x, x + 1)[0]))).sum();
                to[border - x] = mean(sum);
            }
        }
        at += count;
    }
}

/// A ninth, rounded down: exact for what nine bytes can add up to.
#[inline]
fn mean(sum: u16) -> u8 {
    #[expect(clippy::cast_possible_truncation, reason = "nine bytes add up to less than 9 * 256")]
    let mean = ((u32::from(sum) * 7282) >> 16) as u8;
    mean
}

/// A prime, the largest below 2^16.
const ADLER: u32 = 65_521;

/// The Adler-32 checksum, as zlib has it.
#[must_use]
pub fn adler32(bytes: &[u8]) -> u32 {
    let (mut a, mut b) = (1u32, 0u32);
    // so many may be added before a sum overflows
    for part in bytes.chunks(5552) {
        for byte in part {
            a += u32::from(*byte);
            b += a;
        }
        a %= ADLER;
        b %= ADLER;
    }
    (b << 16) | a
}

/// The checksum of two texts, one behind the other, of which the second has so many bytes.
#[must_use]
pub fn adler32_of_both(first: u32, second: u32, length: u64) -> u32 {
    let modulus = u64::from(ADLER);
    let (a1, b1) = (u64::from(first & 0xffff), u64::from(first >> 16));
    let (a2, b2) = (u64::from(second & 0xffff), u64::from(second >> 16));
    // the second began with 1 where it should have begun with the first's sum
    let a = (a1 + a2 + modulus - 1) % modulus;
    let b = (b1 + b2 + length % modulus * (a1 + modulus - 1)) % modulus;
    #[expect(clippy::cast_possible_truncation, reason = "both are below the modulus")]
    let both = ((b << 16) | a) as u32;
    both
}

/// Where a picture's pixels begin, and how many columns and rows it has: of a binary PGM with one byte a pixel.
///
/// # Errors
/// Says what was expected.
pub fn read_pgm(bytes: &[u8]) -> Result<(usize, usize, usize), String> {
    let expected = || "expected a PGM picture (`P5`, width, height, 255)".to_owned();
    if !bytes.starts_with(b"P5") {
        return Err(expected());
    }
    let (mut at, mut numbers) = (2, [0usize; 3]);
    for number in &mut numbers {
        loop {
            match bytes.get(at) {
                Some(b'#') => at += bytes[at..].iter().position(|byte| *byte == b'\n').ok_or_else(expected)?,
                Some(byte) if byte.is_ascii_whitespace() => at += 1,
                _ => break,
            }
        }
        let digits = bytes[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        let text = std::str::from_utf8(&bytes[at..at + digits]).map_err(|_| expected())?;
        *number = text.parse().map_err(|_| expected())?;
        at += digits;
    }
    let [width, height, most] = numbers;
    match bytes.get(at) {
        Some(byte) if byte.is_ascii_whitespace() && most == 255 && width > 0 && height > 0 => {
            Ok((at + 1, width, height))
        }
        _ => Err(expected()),
    }
}
