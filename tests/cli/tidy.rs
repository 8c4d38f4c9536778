//! The rules of the sources, checked by reading them: who may import whom, and where each danger lives.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// The files that may have `unsafe` in them.
const UNSAFE: [&str; 8] = [
    "src/buffer/memory.rs",
    "src/child/http/accept.rs",
    "src/child/trial.rs",
    "src/process/child.rs",
    "src/process/page.rs",
    "src/process/pidfd.rs",
    "src/sandbox/code.rs",
    "src/sandbox/window.rs",
];

/// The only homes of heavy dependencies, and of what prints.
const HOMES: [(&[&str], &[&str]); 7] = [
    (&["landlock::"], &["src/process/jail.rs"]),
    (&["seccompiler::"], &["src/process/filter.rs"]),
    (
        &[
            "wasmtime::",
            "wasmtime_wasi::",
            "wasmtime_wasi_http::",
            "wasmparser::",
            "wasm_encoder::",
            "wiggle::",
            "wit_parser::",
            "wat::",
        ],
        &["src/sandbox/"],
    ),
    (&["rustls::", "rustls_native_certs::", "tokio_rustls::"], &["src/sandbox/host/tls.rs"]),
    (&["clap::"], &["src/cli/", "src/main.rs"]),
    (&["indicatif::"], &["src/report/"]),
    (&["println!", "print!", "eprintln!", "eprint!", "dbg!"], &["src/report/"]),
];

/// Who may not import whom: a part, and those that are above it or beside it.
///
/// `error` sorts the errors of the parts below the modes; beyond that, what is lower knows nothing of what is higher.
const FORBIDDEN: [(&str, &[&str]); 17] = [
    ("mode", &["cli", "report", "main"]),
    ("child", &["cli", "report", "main", "mode", "supervisor"]),
    ("supervisor", &["cli", "report", "main", "mode", "child", "sandbox"]),
    ("process", &["cli", "report", "main", "mode", "child", "supervisor", "sandbox"]),
    ("sandbox", &["cli", "report", "main", "mode", "supervisor", "process"]),
    ("mailbox", &["cli", "report", "main", "mode", "supervisor", "process", "sandbox"]),
    ("error", &["cli", "report", "main", "mode"]),
    ("event", &["cli", "report", "main", "mode", "supervisor", "process", "sandbox", "error"]),
    ("grant", &["cli", "report", "main", "mode", "child", "supervisor", "process", "sandbox", "error"]),
    ("buffer", &["cli", "report", "main", "mode", "child", "supervisor", "process", "sandbox"]),
    ("lines", &["cli", "report", "main", "mode", "child", "supervisor", "process", "sandbox", "error"]),
    ("limits", &["cli", "report", "main", "mode", "supervisor", "process", "sandbox", "error"]),
    ("message", &["cli", "report", "main", "mode", "supervisor", "process", "sandbox", "error"]),
    ("outcome", &["cli", "report", "main", "mode", "supervisor", "process", "sandbox", "error"]),
    ("signal", &["cli", "report", "main", "mode", "child", "supervisor", "process", "sandbox", "error"]),
    ("report", &["main"]),
    ("fuzz", &["cli", "report", "main", "mode", "supervisor"]),
];

/// What a file may take from the crate's root, beside modules: what is re-exported there belongs to some part.
const AT_ROOT: [&str; 1] = ["Error"];

/// A source file, by its path from the package's root.
struct Source {
    path: String,
    text: String,
}

impl Source {
    /// All files below a folder of the package.
    fn all(folder: &str) -> Vec<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut found = vec![];
        let mut folders: Vec<PathBuf> = vec![root.join(folder)];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|ending| ending == "rs") {
                    let text = fs::read_to_string(&path).unwrap();
                    let path = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
                    found.push(Self { path, text });
                }
            }
        }
        found.sort_by(|a, b| a.path.cmp(&b.path));
        found
    }

    /// The lines of code with their numbers: no comments, which may speak of anything.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let lines = self.text.lines().enumerate().map(|(n, line)| (n + 1, line));
        lines.map(|(n, line)| (n, line.split_once("//").map_or(line, |(code, _)| code)))
    }

    /// The part that the file belongs to: `src/sandbox/cache.rs` and `src/sandbox.rs` to `sandbox`.
    fn part(&self) -> &str {
        let path = self.path.strip_prefix("src/").unwrap();
        path.split_once('/').map_or_else(|| path.strip_suffix(".rs").unwrap(), |(folder, _)| folder)
    }

    /// What the file names of its own crate: `crate::a::{b, c::d}` are `a::b` and `a::c::d`.
    fn imports(&self) -> Vec<String> {
        let code: Vec<_> = self.code().map(|(_, line)| line).collect();
        let code = code.join("\n");
        let starts = code.match_indices("crate::").filter(|(at, _)| !code[..*at].ends_with(is_of_a_name));
        let mut found = vec![];
        for (at, start) in starts {
            paths("", &code[at + start.len()..], &mut found);
        }
        found
    }
}

fn is_of_a_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_' || c == '$'
}

/// Reads one path, or one group of paths in braces, and answers what follows it.
fn paths<'a>(prefix: &str, text: &'a str, found: &mut Vec<String>) -> &'a str {
    let text = text.trim_start();
    if let Some(mut rest) = text.strip_prefix('{') {
        loop {
            rest = rest.trim_start().trim_start_matches(',').trim_start();
            if let Some(after) = rest.strip_prefix('}') {
                return after;
            }
            rest = paths(prefix, rest, found);
            let next = rest.find([',', '}']).expect("a group ends");
            rest = &rest[next..];
        }
    }
    let end = text.find(|c| !is_of_a_name(c) && c != '*').unwrap_or(text.len());
    let path = if prefix.is_empty() { text[..end].to_owned() } else { format!("{prefix}::{}", &text[..end]) };
    if let Some(rest) = text[end..].strip_prefix("::") {
        return paths(&path, rest, found);
    }
    found.push(path);
    &text[end..]
}

#[track_caller]
fn none(problems: &[String]) {
    assert!(problems.is_empty(), "\n{}\n", problems.join("\n"));
}

#[test]
fn paths_of_imports_are_read() {
    let source = |text: &str| Source { path: "src/x.rs".into(), text: text.into() };
    let text =
        "use crate::{\n    Error,\n    a::{b, c::{self, d}},\n    e as f,\n};\nlet x = crate::g::h::<I>(); // crate::j";
    assert_eq!(source(text).imports(), ["Error", "a::b", "a::c::self", "a::c::d", "e", "g::h::"]);
    assert_eq!(source("use wrun_crate::x; pub(crate) use self::y; use crate::z::*;").imports(), ["z::*"]);
}

#[test]
fn imports_go_down_only() {
    let forbidden = BTreeMap::from(FORBIDDEN);
    let mut problems = vec![];
    for source in Source::all("src") {
        for import in source.imports() {
            let (top, rest) = import.split_once("::").unwrap_or((&import, ""));
            let is_a_part = top.starts_with(char::is_lowercase);
            if !is_a_part && !AT_ROOT.contains(&top) {
                problems.push(format!("{}: `crate::{top}` is a re-export: name the part that it is of", source.path));
            }
            if forbidden.get(source.part()).is_some_and(|parts| parts.contains(&top)) {
                problems.push(format!(
                    "{}: `{}` may not know `{top}`: crate::{top}::{rest}",
                    source.path,
                    source.part()
                ));
            }
        }
    }
    none(&problems);
}

#[test]
fn modes_do_not_know_each_other() {
    let mut problems = vec![];
    for source in Source::all("src/mode").iter().filter(|source| source.path != "src/mode/mod.rs") {
        let below = &source.path["src/mode/".len()..];
        let own = below.split_once('/').map_or_else(|| below.trim_end_matches(".rs"), |(folder, _)| folder);
        for import in source.imports() {
            if let Some(mode) = import.strip_prefix("mode::").and_then(|rest| rest.split("::").next())
                && mode != own
                // a folder is made of clusters, and jobs of commands
                && ![("watch", "cluster"), ("ci", "command")].contains(&(own, mode))
            {
                problems.push(format!("{}: `crate::{import}` is another mode", source.path));
            }
        }
        // from the file of a mode, or from the `mod.rs` of its folder, `super` is where all modes are
        if !below.contains('/') || below.ends_with("/mod.rs") {
            for (n, line) in source.code().filter(|(_, line)| line.contains("super::") && !line.contains("super::*")) {
                problems.push(format!("{}:{n}: `super` is another mode: {line}", source.path));
            }
        }
    }
    none(&problems);
}

#[test]
fn each_danger_has_one_home() {
    let mut problems = vec![];
    for source in Source::all("src") {
        for (needles, homes) in HOMES {
            if homes.iter().any(|home| source.path.starts_with(home)) {
                continue;
            }
            for (n, line) in source.code() {
                for needle in needles {
                    let named = line.match_indices(needle).any(|(at, _)| !line[..at].ends_with(is_of_a_name));
                    if named {
                        problems.push(format!("{}:{n}: `{needle}` belongs in {homes:?}: {line}", source.path));
                    }
                }
            }
        }
    }
    none(&problems);
}

#[test]
fn unsafe_is_where_it_is_listed_and_says_why() {
    let mut problems = vec![];
    let mut seen = vec![];
    for source in Source::all("src") {
        let lines: Vec<_> = source.text.lines().collect();
        for (n, line) in source.code() {
            let is_unsafe = line.match_indices("unsafe").any(|(at, word)| {
                !line[..at].ends_with(is_of_a_name)
                    && !line[at + word.len()..].starts_with(|c| is_of_a_name(c) || c == '-')
            });
            if !is_unsafe {
                continue;
            }
            if !UNSAFE.contains(&&*source.path) {
                problems.push(format!("{}:{n}: no `unsafe` here: {line}", source.path));
            }
            // the comment right above, however many lines it has
            let above = lines[..n - 1].iter().rev().take_while(|line| line.trim_start().starts_with("//"));
            // or, of a function, what its callers see to
            if !above.into_iter().any(|line| line.contains("SAFETY:") || line.contains("# Safety")) {
                problems.push(format!("{}:{n}: `unsafe` without `SAFETY:` above it: {line}", source.path));
            }
            seen.push(source.path.clone());
        }
    }
    for listed in UNSAFE {
        if !seen.iter().any(|path| path == listed) {
            problems.push(format!("{listed}: has no `unsafe` any more: take it off the list"));
        }
    }
    none(&problems);
}

#[test]
fn files_hold_one_idea() {
    let long = Source::all("src").into_iter().filter_map(|source| {
        let lines = source.text.lines().count();
        (lines > 700).then(|| format!("{}: {lines} lines, which is more than one idea", source.path))
    });
    none(&long.collect::<Vec<_>>());
}

#[test]
fn every_file_says_what_it_is() {
    let silent = [
        "src",
        "tests",
        "fuzz/fuzz_targets",
        "guests/sdk/src",
        "guests/handlers/src",
        "guests/http/src",
        "guests/commands/src",
        "guests/threads/src",
    ]
    .map(Source::all);
    let silent = silent.into_iter().flatten().filter(|source| !source.text.starts_with("//!"));
    none(&silent.map(|source| format!("{}: starts without `//!`", source.path)).collect::<Vec<_>>());
}

#[test]
fn every_feature_file_is_listed() {
    let main = Source::all("tests/cli").into_iter().find(|source| source.path == "tests/cli/main.rs").unwrap().text;
    let forgotten = Source::all("tests/cli").into_iter().filter_map(|source| {
        let name = source.path.strip_prefix("tests/cli/").unwrap().strip_suffix(".rs").unwrap().to_owned();
        (name != "main" && !main.contains(&format!("\nmod {name};\n"))).then_some(source.path)
    });
    none(&forgotten.collect::<Vec<_>>());
}

#[test]
fn every_guest_is_used_by_a_test() {
    let artifacts = Source::all("tests/guest-artifacts/src").remove(0);
    let guests = artifacts.code().filter_map(|(_, line)| line.strip_prefix("pub const ")?.split(':').next());
    let tests = Source::all("tests/cli").into_iter().filter(|source| source.path != "tests/cli/tidy.rs");
    let tests: String = tests.map(|source| source.text).collect();
    let words: Vec<_> = tests.split(|c| !is_of_a_name(c)).collect();
    let unused = guests.filter(|guest| !words.contains(guest));
    none(&unused.map(|guest| format!("no test uses the guest `{guest}`")).collect::<Vec<_>>());
}
