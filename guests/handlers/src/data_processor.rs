//! Doubles and counts numbers: `{"data":[1,2,3]}` gives `{"result":[2,4,6],"count":3}`.

use serde::{Deserialize, Serialize};
use wrun_guest::handler;
use wrun_guest::serde_json::Number;

#[derive(Deserialize)]
struct Job {
    data: Vec<Number>,
}

#[derive(Serialize)]
struct Report {
    result: Vec<Number>,
    count: usize,
}

fn handle(job: Job) -> Result<Report, String> {
    let result = job.data.iter().map(double).collect::<Result<Vec<_>, _>>()?;
    let count = result.len();
    Ok(Report { result, count })
}

/// Keeps integers integers, as long as they fit.
fn double(number: &Number) -> Result<Number, String> {
    let integer = number.as_i64().and_then(|integer| integer.checked_mul(2));
    integer
        .map(Number::from)
        .or_else(|| Number::from_f64(number.as_f64()? * 2.0))
        .ok_or_else(|| format!("{number} is too large to double"))
}

handler!(handle);
