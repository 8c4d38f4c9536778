//! What the settings of an app say: where it is, what it is granted, what bounds it, how it is run.

use std::fs;

use guest_artifacts::{ARGS_P1, CAT, CRASH, ECHO, HELLO, HELLO_HTTP, HOSTILE, HOSTILE_COMMAND_P1, SLOW, UPLOAD};
use serde_json::{Value, json};

use crate::{
    apps::{Apps, guest, kind},
    supervision::event,
    wrun::Folder,
};

#[test]
fn settings_say_what_an_app_may_and_where_it_is() {
    let mut apps = Apps::new();
    apps.put("shop.toml", "route = '/a/shop'\nworkers = 2\nmemory = '32MiB'\n");
    let live = apps.live("shop", guest(UPLOAD));
    assert_eq!(apps.get("/a/shop/x").json()["path"], "/x");
    assert_eq!((apps.get("/shop").status, apps.get("/a").status), (404, 404));
    assert_eq!(apps.listed("shop")["workers"], 2);
    // a change of them is a new version of the app
    apps.put("shop.toml", "host = 'shop.example'\n");
    let other = apps.told("live", "shop");
    assert_eq!(other["former"], live["version"]);
    assert_eq!(apps.get("/a/shop").status, 404);
    let seen = apps.server.request("GET /x HTTP/1.1\r\nHost: Shop.Example:80\r\nConnection: close\r\n\r\n");
    assert_eq!((&seen.json()["path"], &seen.json()["authority"]), (&json!("/x"), &json!("Shop.Example:80")));
    // what is wrong in them is told with its place, and changes nothing
    apps.put("shop.toml", "host = 'shop.example'\nwrokers = 2\n");
    let refused = apps.told("refused", "shop");
    let reason = refused["reason"].as_str().unwrap();
    assert!(reason.starts_with("`shop.toml`: line 2, column 1: unknown field `wrokers`"), "{reason}");
    assert!(
        reason.contains("did you mean `workers`?") && reason.ends_with("2 | wrokers = 2\n    | ^^^^^^^"),
        "{reason}"
    );
    assert_eq!(apps.server.request("GET / HTTP/1.1\r\nHost: shop.example\r\nConnection: close\r\n\r\n").status, 200);
    // a place can be taken once
    apps.put("other.toml", "host = 'shop.example'\n");
    apps.put("other.wasm", guest(HELLO_HTTP));
    assert_eq!(apps.told("refused", "other")["reason"], "the app `shop` is at `shop.example` already");
    // until it is free
    apps.put("shop.toml", "route = '/a/shop'\n");
    let mut live: Vec<_> = (0..2).map(|_| event(&mut apps.server, "live")["app"].clone()).collect();
    live.sort_by_key(ToString::to_string);
    assert_eq!(live, ["other", "shop"]);
    // one that has what no other has
    apps.put("other.toml", "route = '/'\n");
    apps.told("live", "other");
    assert_eq!((apps.get("/").json()["worker"].clone(), apps.get("/any/where").status), (json!(1), 200));
    apps.put("other.toml", "disabled = true\n");
    apps.told("removed", "other");
    assert_eq!((&apps.listed("other")["state"], apps.get("/any/where").status), (&json!("disabled"), 404));
    apps.put("lost.toml", "");
    let refused = apps.told("refused", "lost");
    assert_eq!(refused["reason"], "there is no `lost.wasm` and no `lost.wat` for its settings");
}

#[test]
fn every_setting_is_named_in_the_readme() {
    let folder = Folder::new().file("apps/a.wasm", guest(ECHO)).file("apps/a.toml", "x = 1");
    let found = folder.wrun(["inspect", "apps"]).run().code(2).stdout_text();
    let (_, known) = found.split_once("expected one of ").expect("a list");
    let readme = include_str!("../../README.md");
    let known: Vec<_> = known.lines().next().unwrap().split('`').skip(1).step_by(2).collect();
    assert!(known.len() > 20, "{known:?}");
    for key in known {
        let is_named = [format!("`{key}`"), format!("\n{key} = "), format!("# {key} = "), format!("or: {key} = ")];
        assert!(is_named.iter().any(|form| readme.contains(form)), "`{key}`");
    }
}

#[test]
fn an_app_has_what_its_settings_grant_and_no_more() {
    let mut apps = Apps::new();
    fs::create_dir(apps.folder.path("data")).unwrap();
    fs::write(apps.folder.path("data/words.txt"), "granted").unwrap();
    // nothing by default
    apps.live("app", guest(HOSTILE));
    let read = json!({"do": "read", "path": "/data/words.txt"}).to_string();
    assert!(apps.server.post("/app", &read).json()["error"].is_string());
    apps.put("app.toml", "dir = ['../data::/data:ro']\n");
    apps.told("live", "app");
    let answer = apps.server.post("/app", &read);
    assert_eq!((answer.status, answer.json()), (200, json!({"text": "granted"})));
    let write = json!({"do": "write", "path": "/data/words.txt", "text": "x"}).to_string();
    assert!(apps.server.post("/app", write).json()["error"].is_string());
    // a folder that is not there
    apps.put("app.toml", "dir = ['nowhere::/data']\n");
    let refused = apps.told("refused", "app");
    assert!(refused["reason"].as_str().unwrap().contains("nowhere"), "{refused}");
}

#[test]
fn a_command_runs_once_for_each_request_when_its_settings_say_so() {
    let mut apps = Apps::new();
    apps.put("cat.wasm", guest(CAT));
    let reason = apps.told("refused", "cat")["reason"].clone();
    assert!(reason.as_str().unwrap().contains("expected an http guest, found a command guest"), "{reason}");
    apps.put("cat.toml", "mode = 'command'\nbody-max = '1MiB'\n");
    assert!(apps.told("refused", "cat")["reason"].as_str().unwrap().contains("unknown field `body-max`"));
    apps.put("cat.toml", "mode = 'command'\nstdout-max = '1000B'\nworkers = 2\n");
    apps.told("live", "cat");
    let answer = apps.server.post("/cat", "some text\n");
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("text/plain; charset=utf-8")));
    assert_eq!(answer.text(), "some text\n");
    let answer = apps.server.post("/cat", [0xff, 0]);
    assert_eq!((answer.body, answer.headers[0].1.as_str()), (vec![0xff, 0], "application/octet-stream"));
    assert_eq!((apps.get("/cat").status, apps.get("/cat").text()), (200, String::new()));
    assert_eq!(apps.server.post("/cat", vec![b'x'; 1000]).text().len(), 1000);
    assert_eq!(kind(&apps.server.post("/cat", vec![b'x'; 1001])), (500, "limit".into()));
    // a core module as well, which learns of the request, and of nothing else that was not given to it
    apps.put(
        "args.toml",
        "mode = 'command'\ncontent-type = 'application/json'\nargs = ['a b']\n[env]\nMINE = '1'\nREMOTE_ADDR = 'x'\n",
    );
    apps.live("args", guest(ARGS_P1));
    let head = "PUT /args/x%20y?q=1 HTTP/1.1\r\nHost: a\r\nProxy: evil\r\nContent-Type: text/x\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi";
    let answer = apps.server.request(head);
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let env = json!({
        "GATEWAY_INTERFACE": "CGI/1.1", "SERVER_PROTOCOL": "HTTP/1.1", "REQUEST_METHOD": "PUT", "PATH_INFO": "/x%20y",
        "QUERY_STRING": "q=1", "REMOTE_ADDR": "x", "CONTENT_LENGTH": "2", "CONTENT_TYPE": "text/x", "MINE": "1",
    });
    assert_eq!(answer.json(), json!({"args": ["args", "a b"], "env": env}));
    // whatever becomes of a run, the next one is another
    for (args, status, found) in [
        ("['exit', '0']", 200, ""),
        ("['exit', '3']", 500, "exited"),
        ("['trap']", 500, "trapped"),
        ("['spin']", 504, "limit"),
        ("['grow', '10']", 200, ""),
        ("['grow', '80']", 500, "limit"),
    ] {
        apps.put("act.toml", format!("mode = 'command'\ntimeout = '300ms'\nmemory = '64MiB'\nargs = {args}\n"));
        if apps.path("act.wasm").exists() {
            apps.told("live", "act");
        } else {
            apps.live("act", guest(HOSTILE_COMMAND_P1));
        }
        for _ in 0..2 {
            let answer = apps.get("/act");
            assert_eq!(answer.status, status, "{args}: {answer:?}");
            if status != 200 {
                assert_eq!(kind(&answer).1, found, "{args}");
            }
        }
    }
    // and one that never reads its input does not wait for it
    apps.put("act.toml", "mode = 'command'\nargs = ['stderr', 'to the log']\n");
    apps.told("live", "act");
    assert_eq!(apps.server.post("/act", vec![b'x'; 3 << 20]).text(), "");
    let output = apps.told("output", "act");
    assert_eq!((&output["line"], &output["stream"]), (&json!("to the log"), &json!("stderr")));
}

#[test]
fn limits_of_an_app_hold() {
    let mut apps = Apps::new();
    apps.put("slow.toml", "timeout = '300ms'\n");
    apps.live("slow", guest(SLOW));
    assert_eq!(apps.get("/slow?ms=10").status, 200);
    assert_eq!(kind(&apps.get("/slow?ms=5000")), (504, "limit".into()));
    apps.put("crash.toml", "memory = '64MiB'\n");
    apps.live("crash", guest(CRASH));
    assert_eq!(apps.get("/crash/memory?mib=30").status, 200);
    assert_eq!(apps.get("/crash/memory?mib=80").status, 500);
    apps.put("echo.toml", "message-max = '10B'\n");
    apps.live("echo", guest(ECHO));
    assert_eq!(
        (apps.server.post("/echo", "12345678").status, apps.server.post("/echo", "12345678901").status),
        (200, 413)
    );
}

#[test]
fn inspect_says_what_would_be_served_and_why_not_the_rest() {
    let folder = Folder::new()
        .file("apps/good.wasm", guest(HELLO_HTTP))
        .file("apps/shop.wasm", guest(ECHO))
        .file("apps/shop.toml", "route = '/a/b'")
        .file("apps/.hidden.wasm", "")
        .link("apps/out.wasm", "/proc/self/exe");
    let text = folder.wrun(["inspect", "apps"]).run().code(0).stdout_text();
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[0].starts_with("good: version ") && lines[0].ends_with(" at /good"), "{text}");
    assert!(lines[1].starts_with("shop: version ") && lines[1].ends_with(" at /a/b"), "{text}");
    let ignored =
        [".hidden.wasm: ignored: its name starts with a dot", "out.wasm: ignored: it is a link out of the folder"];
    assert_eq!(lines[2..], ignored);
    let folder = folder
        .file("apps/bad.wasm", "junk")
        .file("apps/twice.wasm", guest(ECHO))
        .file("apps/twice.toml", "route = '/good'")
        .file("apps/wrong.wasm", guest(HELLO))
        .file("apps/off.wasm", guest(ECHO))
        .file("apps/off.toml", "disabled = true")
        .file("apps/lost.wasm", guest(ECHO))
        .file("apps/lost.toml", "dir = ['nowhere::/data']")
        .file("apps/typo.wasm", guest(ECHO))
        .file("apps/typo.toml", "memroy = '1MiB'");
    let found = folder.wrun(["inspect", "apps", "--json"]).run().code(2);
    let found: Value = serde_json::from_str(&found.stdout_text()).unwrap();
    let refused = |name: &str| {
        let app = found["apps"].as_array().unwrap().iter().find(|app| app["name"] == name).unwrap();
        app["refused"].as_str().unwrap_or_default().to_owned()
    };
    assert_eq!((refused("good"), refused("shop")), (String::new(), String::new()));
    assert!(refused("bad").contains("not WAT") && refused("wrong").contains("`mode = \"command\"`"));
    assert_eq!(refused("twice"), "another app is at `/good` already");
    assert_eq!(refused("off"), "it is disabled");
    assert!(refused("lost").contains("nowhere"), "{}", refused("lost"));
    assert!(refused("typo").contains("did you mean `memory`?"), "{}", refused("typo"));
}
