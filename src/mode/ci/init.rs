//! A job file for guests that are there.

use std::{
    collections::HashSet,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

/// How deep guests are looked for.
const DEPTH_MAX: usize = 4;

/// The most guests that a file is made for.
const GUESTS_MAX: usize = 50;

/// A job file with comments for the guests below a folder, and how many those are. `runs` says which of them can be run.
#[must_use]
pub fn init(folder: &Path, runs: impl Fn(&Path) -> bool) -> (String, usize) {
    let mut guests = vec![];
    find(folder, Path::new(""), 0, &mut guests);
    // a job file is a text
    guests.retain(|guest| guest.to_str().is_some() && runs(&folder.join(guest)));
    guests.truncate(GUESTS_MAX);
    let mut text = String::from(HEAD);
    let mut ids = HashSet::new();
    for guest in &guests {
        let id = id_of(guest, &mut ids);
        let path = guest.display().to_string();
        let _ = write!(text, "\n[[job]]\nid = \"{id}\"\nwasm = {}\n", serde_json::Value::from(path));
        if ids.len() == 1 {
            text += MORE;
        }
    }
    if guests.is_empty() {
        text += NONE;
    }
    (text, guests.len())
}

const HEAD: &str = r#"# Jobs for `wrun ci`. `wrun ci check` says what is wrong here, and `wrun ci schema` prints a schema for editors.
version = 1

[run]
# jobs = 4                # how many run at once; default: one for each core
# fail-fast = true        # start no more after one has failed
retries = 0

[defaults]                # for all jobs that say nothing else
memory = "256MiB"
timeout = "60s"
# fuel = 5_000_000_000    # the cost of a job, the same on every machine
"#;

const MORE: &str = r#"# args = ["--help"]
# inputs = [{ from = "fixtures", to = "/in" }]              # copies, read-only
# outputs = [{ from = "/out", to = "artifacts/files" }]     # what it leaves there is kept
# needs = ["another-job"]
# expect = { exit = 0 }
"#;

const NONE: &str = r#"
# No guest was found here: build one for `wasm32-wasip1` or `wasm32-wasip2`, and name it.
# [[job]]
# id = "unit"
# wasm = "target/wasm32-wasip1/debug/unit.wasm"
"#;

/// All files below a folder that are called as guests are, in the order of their names.
fn find(root: &Path, below: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(root.join(below)) else { return };
    let mut entries: Vec<_> = entries.flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (name, path) = (entry.file_name(), below.join(entry.file_name()));
        let Ok(kind) = entry.file_type() else { continue };
        // what builds leave there is not what they are for
        let is_aside = name.to_string_lossy().starts_with('.')
            || ["deps", "node_modules", "artifacts"].iter().any(|it| name == *it);
        if kind.is_dir() && depth < DEPTH_MAX && !is_aside {
            find(root, &path, depth + 1, found);
        } else if kind.is_file() && path.extension().is_some_and(|ending| ending == "wasm" || ending == "wat") {
            found.push(path);
        }
    }
}

/// An id that no other has.
fn id_of(guest: &Path, ids: &mut HashSet<String>) -> String {
    let stem = guest.file_stem().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    let plain: String = stem.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(56).collect();
    let plain = plain.trim_matches('-');
    let plain = if plain.is_empty() { "job" } else { plain };
    let mut numbers = 2..;
    let mut id = plain.to_owned();
    while !ids.insert(id.clone()) {
        id = format!("{plain}-{}", numbers.next().unwrap_or_default());
    }
    id
}
