//! `wrun inspect`: what a guest is, what it asks for, which modes can run it.

use guest_artifacts::{
    ARGS, CAT, CAT_P1, ECHO, FETCH, FOREIGN_HTTP, GATEWAY, HELLO, HELLO_HTTP, HELLO_P1, NET, NET_P1, WHOAMI,
};
use serde_json::{Value, json};

use crate::{
    guests::command_component,
    wrun::{Folder, wrun},
};

fn inspect(guest: &str) -> Value {
    wrun(["inspect", "--json", guest]).run().code(0).stderr("").stdout_json()
}

/// Whether a list of names has one.
fn has(list: &Value, name: &str) -> bool {
    list.as_array().expect("a list").iter().any(|entry| entry == name)
}

#[test]
fn a_command_component() {
    let found = inspect(CAT);
    assert_eq!(
        (&found["name"], &found["form"], &found["shape"]),
        (&json!("cat"), &json!("component"), &json!("command"))
    );
    assert_eq!((&found["modes"], &found["refused"]), (&json!(["run", "spawn", "exec", "fork"]), &json!([])));
    assert_eq!(found["flags"], json!(["--dir", "--env"]));
    assert!(has(&found["imports"], "wasi:filesystem/preopens@0.2.6"), "{found}");
    assert_eq!(found["exports"], json!(["wasi:cli/run@0.2.0"]));
    assert_eq!(found["bytes"], json!(std::fs::metadata(CAT).unwrap().len()));
    for field in ["code_bytes", "data_bytes", "functions"] {
        assert!(found[field].as_u64() > Some(0), "{field} in {found}");
    }
}

#[test]
fn a_command_module() {
    let found = inspect(CAT_P1);
    assert_eq!((&found["name"], &found["form"], &found["shape"]), (&json!("cat"), &json!("module"), &json!("command")));
    assert_eq!((&found["modes"], &found["refused"]), (&json!(["run", "spawn", "exec", "fork"]), &json!([])));
    assert_eq!(found["flags"], json!(["--dir", "--env"]));
    assert!(has(&found["imports"], "wasi_snapshot_preview1::fd_write"), "{found}");
    assert!(has(&found["exports"], "_start"), "{found}");
}

#[test]
fn a_handler() {
    let found = inspect(ECHO);
    assert_eq!((&found["form"], &found["shape"]), (&json!("component"), &json!("handler")));
    assert_eq!((&found["modes"], &found["refused"]), (&json!(["cluster", "fork", "threads"]), &json!([])));
    assert_eq!(found["flags"], json!([]));
    assert_eq!(found["exports"], json!(["wrun:guest/handler@0.1.0"]));
}

#[test]
fn an_http_guest() {
    let found = inspect(HELLO_HTTP);
    assert_eq!((&found["form"], &found["shape"]), (&json!("component"), &json!("http")));
    assert_eq!((&found["modes"], &found["refused"]), (&json!(["cluster"]), &json!([])));
    assert_eq!(found["flags"], json!(["--data"]));
    assert!(has(&found["imports"], "wasi:http/types@0.2.12"), "{found}");
    assert_eq!(found["exports"], json!(["wasi:http/incoming-handler@0.2.12"]));
    // one that is a command as well is served
    let found = inspect(FOREIGN_HTTP);
    assert_eq!(
        (&found["shape"], &found["modes"], &found["refused"]),
        (&json!("http"), &json!(["cluster"]), &json!([]))
    );
    assert!(has(&found["exports"], "wasi:cli/run@0.2.0"), "{found}");
}

#[test]
fn flags_follow_the_imports() {
    assert_eq!(inspect(HELLO)["flags"], json!(["--env"]));
    assert_eq!(inspect(ARGS)["flags"], json!(["--env"]));
    assert_eq!(inspect(NET)["flags"], json!(["--env", "--tcp"]));
    assert_eq!(inspect(NET_P1)["flags"], json!(["--env"]));
    assert_eq!(inspect(FETCH)["flags"], json!(["--env", "--http"]));
    assert!(has(&inspect(GATEWAY)["flags"], "--http"));
    let found = inspect(WHOAMI);
    assert!(has(&found["imports"], "wrun:guest/worker@0.1.0"), "{found}");
    assert!(has(&found["flags"], "--data"), "{found}");
    let found = Folder::new().file("none.wat", r#"(module (func (export "_start")))"#);
    let found = found.wrun(["inspect", "--json", "none.wat"]).run().code(0).stdout_json();
    assert_eq!((&found["name"], &found["imports"], &found["flags"]), (&json!("none"), &json!([]), &json!([])));
}

#[test]
fn the_text_says_the_same() {
    let wat = r#"(module
        (import "wasi_snapshot_preview1" "environ_get" (func (param i32 i32) (result i32)))
        (memory (export "memory") 1)
        (data (i32.const 0) "four")
        (func (export "_start")))"#;
    wrun(["inspect", "-"]).stdin(wat).run().code(0).stderr("").stdout(
        "\
name      stdin
shape     command
form      core module
size      108 bytes: code 3 in 1 functions, data 10
memory    64KiB to start with
modes     run, spawn, exec, fork
flags     --env
imports   wasi_snapshot_preview1::environ_get
exports   memory
          _start
",
    );
    let text = wrun(["inspect", HELLO_P1]).run().code(0).stderr("").stdout_text();
    assert!(text.starts_with("name      hello\nshape     command\nform      core module\n"), "{text}");
    let text = wrun(["inspect", ECHO]).run().code(0).stderr("").stdout_text();
    assert!(text.contains("\nshape     handler\nform      component\n"), "{text}");
    assert!(text.contains("\nmodes     cluster, fork, threads\n"), "{text}");
}

#[test]
fn what_is_not_offered_is_refused_with_a_hint() {
    let wat = r#"(module (import "env" "puts" (func)) (func (export "_start")))"#;
    let folder = Folder::new().file("c.wat", wat).file("http.wat", command_component("wasi:http/types@0.3.0"));

    let found = folder.wrun(["inspect", "--json", "c.wat"]).run().code(0).stdout_json();
    assert_eq!((&found["shape"], &found["modes"]), (&json!("command"), &json!([])));
    let hint = "an import from `env` is usually a C function that was not linked in";
    assert_eq!(found["refused"], json!([{"import": "env::puts", "hint": hint}]));

    let text = folder.wrun(["inspect", "c.wat"]).run().code(0).stdout_text();
    assert!(text.contains("\nmodes     none\n"), "{text}");
    assert!(text.ends_with(&format!("\nrefused   env::puts: {hint}\n")), "{text}");

    let found = folder.wrun(["inspect", "--json", "http.wat"]).run().code(0).stdout_json();
    assert_eq!((&found["form"], &found["modes"]), (&json!("component"), &json!([])));
    assert_eq!(found["refused"][0]["import"], json!("wasi:http/types@0.3.0"));
}

#[test]
fn what_wrun_cannot_run_is_inspected_all_the_same() {
    let inspect = |wat: &str| wrun(["inspect", "--json", "-"]).stdin(wat).run().code(0).stderr("").stdout_json();
    for wat in [r#"(module (func (export "add")))"#, "(component)"] {
        let found = inspect(wat);
        assert_eq!((&found["shape"], &found["modes"]), (&Value::Null, &json!([])));
    }
    let text = wrun(["inspect", "-"]).stdin("(component)").run().code(0).stdout_text();
    assert!(text.contains("\nshape     nothing that wrun can run\n"), "{text}");
}

#[test]
fn names_in_a_guest_cannot_forge_output() {
    let wat = r#"(module (func (export "\1b[2J\nshape     command")))"#;
    let text = wrun(["inspect", "-"]).stdin(wat).run().code(0).stdout_text();
    assert!(text.ends_with("\nexports   \\u{1b}[2J\\nshape     command\n"), "{text}");
}

#[test]
fn nothing_is_compiled() {
    let folder = Folder::new();
    folder.wrun(["inspect", ECHO]).private_cache().run().code(0);
    assert_eq!(folder.names("cache"), [""; 0]);
}
