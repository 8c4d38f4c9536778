//! Draws the Mandelbrot set: `{"width":800,"height":600,"file":"picture.pgm"}` writes a grey picture into a folder that was
//! granted; without a file nothing is written.
//!
//! The workers draw into one picture, row by row, each taking the next that nobody has taken. The last to finish writes
//! the file and replies with how many rows each has drawn, and the time that its own took.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};

use serde::{Deserialize, Serialize};
use threads::{part, timed};
use wrun_guest::handler;

#[derive(Deserialize)]
struct Order {
    width: u32,
    height: u32,
    #[serde(default = "iterations")]
    iterations: u32,
    file: Option<PathBuf>,
}

fn iterations() -> u32 {
    255
}

#[derive(Serialize)]
struct Drawn {
    rows: Vec<u32>,
    /// The sum of all grey values, by which two pictures can be compared.
    sum: u64,
    compute_ms: f64,
}

static NEXT_ROW: AtomicU32 = AtomicU32::new(0);
static PICTURE: OnceLock<Vec<AtomicU8>> = OnceLock::new();
static ROWS: Mutex<Vec<u32>> = Mutex::new(vec![]);

fn handle(order: Order) -> Option<Result<Drawn, String>> {
    let (_, count) = part();
    let Order { width, height, .. } = order;
    let size = (width as usize).checked_mul(height as usize).filter(|size| *size > 0);
    let Some(size) = size else { return Some(Err("expected a picture with a width and a height".into())) };
    let picture = PICTURE.get_or_init(|| (0..size).map(|_| AtomicU8::new(0)).collect());
    let (drawn, compute_ms) = timed(|| {
        let mut drawn = 0;
        loop {
            let row = NEXT_ROW.fetch_add(1, Ordering::Relaxed);
            if row >= height {
                return drawn;
            }
            for column in 0..width {
                let grey = grey(&order, column, row);
                picture[row as usize * width as usize + column as usize].store(grey, Ordering::Relaxed);
            }
            drawn += 1;
        }
    });
    let mut rows = ROWS.lock().expect("nobody panics");
    rows.push(drawn);
    if rows.len() < count as usize {
        return None;
    }
    let bytes: Vec<u8> = picture.iter().map(|grey| grey.load(Ordering::Relaxed)).collect();
    if let Some(file) = &order.file {
        let mut content = format!("P5 {width} {height} 255\n").into_bytes();
        content.extend_from_slice(&bytes);
        if let Err(error) = fs::write(file, content) {
            return Some(Err(format!("{}: {error}", file.display())));
        }
    }
    let sum = bytes.iter().map(|grey| u64::from(*grey)).sum();
    Some(Ok(Drawn { rows: rows.clone(), sum, compute_ms }))
}

/// How fast the series of a point leaves: black is never.
fn grey(order: &Order, column: u32, row: u32) -> u8 {
    let (width, height) = (f64::from(order.width), f64::from(order.height));
    let real = f64::from(column) / width * 3.5 - 2.5;
    let imaginary = (f64::from(row) / height - 0.5) * 2.0;
    let (mut x, mut y) = (0.0, 0.0);
    for iteration in 0..order.iterations {
        let (xx, yy) = (x * x, y * y);
        if xx + yy > 4.0 {
            return u8::try_from(255 - iteration % 255).expect("a byte");
        }
        y = 2.0 * x * y + imaginary;
        x = xx - yy + real;
    }
    0
}

handler!(handle);
