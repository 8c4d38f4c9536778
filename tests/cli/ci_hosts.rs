//! What others run `wrun ci` with: the action for GitHub, the component for GitLab. Their shell steps are run as they are
//! written.

use std::{fs, path::Path, process::Command};

use crate::{
    ci::{Jobs, hello, job},
    wrun::WRUN,
};

fn file(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap()
}

/// The blocks of text below a key of a YAML file, without their indent.
fn blocks(text: &str, key: &str) -> Vec<String> {
    let mut blocks = vec![];
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        if line.trim_start() != key {
            continue;
        }
        let indent = lines.peek().unwrap().len() - lines.peek().unwrap().trim_start().len();
        let mut block = String::new();
        while let Some(line) = lines.next_if(|line| line.is_empty() || line.starts_with(&" ".repeat(indent))) {
            block += line.get(indent..).unwrap_or_default();
            block.push('\n');
        }
        blocks.push(block);
    }
    blocks
}

/// Runs a script where `wrun` is installed. Its exit code, and what it printed.
fn run(jobs: &Jobs, script: &str, env: &[(&str, &str)]) -> (i32, String) {
    let bin = jobs.folder.path("bin");
    if !bin.exists() {
        fs::create_dir(&bin).unwrap();
        std::os::unix::fs::symlink(WRUN, bin.join("wrun")).unwrap();
    }
    let output = Command::new("bash")
        .args(["--noprofile", "--norc", "-eo", "pipefail", "-c", script])
        .current_dir(jobs.folder.path("."))
        .env_clear()
        .env("PATH", format!("{}:/usr/bin:/bin", bin.display()))
        .env("XDG_CACHE_HOME", jobs.folder.path("cache"))
        .envs(env.iter().copied())
        .output()
        .unwrap();
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap(),
    )
}

fn some_jobs() -> Jobs {
    Jobs::of(hello("good", "tags = ['fast']") + &job("bad", &["exit", "1"], ""))
}

#[test]
fn the_actions_steps_run_jobs_and_leave_reports() {
    let action = file("action.yml");
    let steps = blocks(&action, "run: |");
    let [install, jobs_step] = &steps[..] else { panic!("{steps:?}") };
    let jobs = some_jobs();
    let (code, text) = run(&jobs, install, &[]);
    assert!(code == 0 && text.contains("bin/wrun"), "{text}");
    let summary = jobs.folder.path("step.md").display().to_string();
    let env = |filter: &'static str| {
        [
            ("WRUN_FILE", "wrun-ci.toml"),
            ("WRUN_FILTER", filter),
            ("WRUN_PARTITION", "1/1"),
            ("WRUN_ARTIFACTS", "out/reports"),
            ("GITHUB_ACTIONS", "true"),
        ]
    };
    let (code, text) = run(&jobs, jobs_step, &[&env("")[..], &[("GITHUB_STEP_SUMMARY", &summary)]].concat());
    assert_eq!(code, 100, "{text}");
    assert!(text.contains("::error title="), "{text}");
    assert_eq!(jobs.folder.names("out/reports"), [".gitignore", "index.html", "junit.xml", "logs", "run.json"]);
    assert!(jobs.folder.read("step.md").contains("bad"));
    let (code, text) = run(&jobs, jobs_step, &env("tag(fast) & !id(`touch stolen`)"));
    assert_eq!((code, jobs.folder.path("stolen").exists()), (0, false), "{text}");
    // each variable of the step is an input's, and each input is one of the step's
    for input in ["file", "filter", "partition", "artifacts"] {
        assert!(action.contains(&format!("WRUN_{}: ${{{{ inputs.{input} }}}}", input.to_uppercase())), "{input}");
    }
}

#[test]
fn the_components_script_runs_jobs_and_leaves_reports() {
    let component = file("templates/wrun-ci.yml");
    let script = blocks(&component, "script:").remove(0);
    // items of a list, one of which goes over several lines
    let script =
        script.replace("- >-\n", "- ").replace("artifacts\n  --junit", "artifacts --junit").replace("\n  ", " ");
    let commands: Vec<_> = script.lines().filter_map(|line| line.strip_prefix("- ")).map(str::trim).collect();
    assert_eq!(commands.len(), 1, "{commands:?}");
    let jobs = some_jobs();
    let env = [("WRUN_FILE", "wrun-ci.toml"), ("GITLAB_CI", "true"), ("CI", "true")];
    let (code, text) = run(&jobs, &commands.join("\n"), &env);
    assert_eq!(code, 100, "{text}");
    assert_eq!(jobs.folder.names("artifacts"), [".gitignore", "index.html", "junit.xml", "logs", "run.json"]);
    // on two runners each job runs once
    let part = |index| {
        let (_, text) =
            run(&jobs, &commands.join("\n"), &[&env[..], &[("CI_NODE_INDEX", index), ("CI_NODE_TOTAL", "2")]].concat());
        usize::from(text.contains("] good")) + 2 * usize::from(text.contains("] bad"))
    };
    assert_eq!(part("1") + part("2"), 3);
}
