//! A folder whose guests are live: what comes and goes there, and what is taken of it.

use std::{collections::BTreeSet, fs, io::Write, os::unix::fs::PermissionsExt};

use guest_artifacts::{ECHO, HELLO_HTTP, UPLOAD};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, prlimit};
use serde_json::{Value, json};

use crate::{
    apps::{Apps, events_of, guest, kind, variant},
    load::{Load, eventually},
    supervision::{event, events},
    wrun::Folder,
};

#[test]
fn a_guest_that_is_dropped_is_live_and_one_that_is_removed_is_gone() {
    let mut apps = Apps::new();
    assert_eq!(apps.get("/").json(), json!({"apps": []}));
    assert_eq!(kind(&apps.get("/upload")), (404, "not-found".into()));
    let live = apps.live("upload", guest(UPLOAD));
    for (path, seen) in [
        ("/upload", "/"),
        ("/upload?a=b", "/?a=b"),
        ("/upload/", "/"),
        ("/upload/a/../b%2f?c=/d", "/a/../b%2f?c=/d"),
        ("/upload//x", "//x"),
    ] {
        assert_eq!(apps.get(path).json()["path"], seen, "{path}");
    }
    for path in ["/uploads", "/Upload", "/x/upload", "//upload"] {
        assert_eq!(apps.get(path).status, 404, "{path}");
    }
    let listed = apps.listed("upload");
    assert_eq!((&listed["state"], &listed["at"], &listed["workers"]), (&json!("live"), &json!("/upload"), &json!(1)));
    assert_eq!((&listed["version"], &listed["error"]), (&live["version"], &Value::Null));
    let page = apps.server.request("GET / HTTP/1.1\r\nHost: a\r\nAccept: text/html\r\nConnection: close\r\n\r\n");
    assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
    assert!(page.text().contains("<a href=\"/upload\">upload</a><td>live"), "{}", page.text());
    assert!(listed["since_ms"].as_u64() > Some(1_700_000_000_000));
    fs::remove_file(apps.path("upload.wasm")).unwrap();
    apps.told("removed", "upload");
    assert_eq!(kind(&apps.get("/upload")), (404, "not-found".into()));
    assert_eq!(apps.get("/").json(), json!({"apps": []}));
    // at the end of all, all are told of
    apps.live("other", guest(HELLO_HTTP));
    apps.server.signal(Signal::TERM);
    let finished = apps.server.running.wait().code(0);
    let events = events(&finished);
    assert!(events.iter().all(|event| event["event"] != "error"), "{}", finished.stderr_text());
    let exits: Vec<_> = events.iter().filter(|event| event["event"] == "exit").collect();
    assert!(exits.iter().all(|exit| exit["outcome"]["voluntary"] == true), "{exits:?}");
    assert!(exits.iter().any(|exit| exit["app"] == "other") && exits.iter().any(|exit| exit["part"] == "router"));
}

#[test]
fn texts_and_handlers_are_apps_too() {
    let mut apps = Apps::new();
    apps.live("echo", guest(ECHO));
    assert_eq!(apps.server.post("/echo", "[1, 2]").text(), "[1, 2]");
    assert_eq!(kind(&apps.get("/echo")), (405, "method".into()));
    // what can be read is no less a guest than what is compiled, and no more
    apps.put("text.wat", "(component)");
    let refused = apps.told("refused", "text");
    assert!(refused["reason"].as_str().unwrap().contains("exports nothing wrun can run"), "{refused}");
    apps.put("text.wat", "(component");
    let refused = apps.told("refused", "text");
    assert!(refused["reason"].as_str().unwrap().contains("expected `)`"), "{refused}");
    apps.put("echo.wat", "(component)");
    let ignored = event(&mut apps.server, "ignored");
    assert_eq!(
        (&ignored["file"], &ignored["reason"]),
        (&json!("echo.wat"), &json!("there is a `.wasm` of the same name"))
    );
    assert_eq!(apps.server.post("/echo", "3").text(), "3");
}

#[test]
fn what_is_there_at_the_start_is_served() {
    let folder = Folder::new().file("apps/a.wasm", guest(HELLO_HTTP)).file("apps/b.wasm", guest(ECHO));
    let mut apps = Apps::of(folder.file("apps/c.wasm", "junk").file("apps/README", "no app"), |wrun| wrun);
    let mut names: Vec<_> = (0..2).map(|_| event(&mut apps.server, "live")["app"].clone()).collect();
    names.sort_by_key(ToString::to_string);
    assert_eq!(names, ["a", "b"]);
    assert_eq!((apps.get("/a").status, apps.server.post("/b", "1").text()), (200, "1".into()));
    eventually("the third is refused", || apps.listed("c")["state"] == "refused");
    assert!(apps.listed("c")["error"].as_str().unwrap().contains("found a text that is not WAT"));
}

#[test]
fn a_file_that_is_written_slowly_is_not_read_before_it_is_closed() {
    let mut apps = Apps::new();
    // of any length: what makes it whole is that its writer closes it
    let whole = [guest(HELLO_HTTP), vec![0; 0]].concat();
    let mut file = fs::File::create(apps.path("slow.wasm")).unwrap();
    let (first, rest) = whole.split_at(whole.len() / 2);
    file.write_all(first).unwrap();
    // as long as any file rests that nobody is heard to write
    apps.live("other", guest(HELLO_HTTP));
    fs::remove_file(apps.path("other.wasm")).unwrap();
    apps.told("removed", "other");
    assert_eq!(apps.listed("slow"), Value::Null);
    file.write_all(rest).unwrap();
    drop(file);
    apps.told("live", "slow");
    assert_eq!(apps.get("/slow").status, 200);
    // over one that is live, too
    let before = apps.listed("slow")["version"].clone();
    let mut file = fs::File::create(apps.path("slow.wasm")).unwrap();
    file.write_all(first).unwrap();
    apps.live("other", guest(HELLO_HTTP));
    assert_eq!((apps.get("/slow").status, &apps.listed("slow")["version"]), (200, &before));
    assert_eq!(apps.listed("slow")["error"], Value::Null);
    file.write_all(&variant(HELLO_HTTP, 1)[first.len()..]).unwrap();
    drop(file);
    let live = apps.told("live", "slow");
    assert_eq!(live["former"], before);
}

#[test]
fn a_file_may_come_in_any_way_that_files_come() {
    let mut apps = Apps::new();
    // written and then made readable
    let path = apps.path("modes.wasm");
    fs::write(&path, guest(HELLO_HTTP)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    apps.told("live", "modes");
    // a link to a file that is elsewhere, and one that replaces it
    fs::write(apps.folder.path("elsewhere"), guest(HELLO_HTTP)).unwrap();
    fs::hard_link(apps.folder.path("elsewhere"), apps.path("link.wasm")).unwrap();
    apps.told("live", "link");
    // as editors save: the old one is put aside, a new one is written, the old one removed
    fs::rename(apps.path("link.wasm"), apps.path("link.wasm~")).unwrap();
    fs::write(apps.path("link.wasm"), variant(HELLO_HTTP, 1)).unwrap();
    fs::remove_file(apps.path("link.wasm~")).unwrap();
    apps.told("live", "link");
    // a link within the folder, as mounted configurations have it
    fs::create_dir(apps.path("..data")).unwrap();
    fs::write(apps.path("..data/soft.wasm"), guest(HELLO_HTTP)).unwrap();
    std::os::unix::fs::symlink("..data/soft.wasm", apps.path("soft.wasm")).unwrap();
    apps.told("live", "soft");
    assert_eq!(apps.get("/").json()["apps"].as_array().unwrap().len(), 3);
    assert_eq!(events_of(apps, "removed").len(), 0);
}

#[test]
fn what_is_no_app_is_ignored_for_a_reason() {
    let mut apps = Apps::new();
    for name in [".hidden.wasm", "backup.wasm~", "#edited.wasm#", "half.wasm.part", "half.wasm.tmp", "README.md"] {
        apps.put(name, guest(HELLO_HTTP));
    }
    fs::write(apps.folder.path("outside.wasm"), guest(HELLO_HTTP)).unwrap();
    for (name, to) in [("out.wasm", "../outside.wasm"), ("root.wasm", "/proc/self/exe")] {
        std::os::unix::fs::symlink(to, apps.path(name)).unwrap();
        let ignored = event(&mut apps.server, "ignored");
        assert_eq!((&ignored["file"], &ignored["reason"]), (&json!(name), &json!("it is a link out of the folder")));
    }
    fs::create_dir(apps.path("folder.wasm")).unwrap();
    assert_eq!(event(&mut apps.server, "ignored")["reason"], "it is a folder");
    rustix::fs::mkfifoat(rustix::fs::CWD, apps.path("pipe.wasm"), 0o644.into()).unwrap();
    assert_eq!(event(&mut apps.server, "ignored")["reason"], "it is a special file");
    apps.put("bad name.wasm", guest(HELLO_HTTP));
    assert!(event(&mut apps.server, "ignored")["reason"].as_str().unwrap().starts_with("expected a name"));
    apps.live("good", guest(HELLO_HTTP));
    let names: Vec<_> =
        apps.get("/").json()["apps"].as_array().unwrap().iter().map(|app| app["name"].clone()).collect();
    assert_eq!(names, ["good"]);
}

#[test]
fn events_that_were_lost_are_no_loss() {
    let queue: usize = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap().trim().parse().unwrap();
    let mut apps = Apps::new();
    apps.live("app", guest(HELLO_HTTP));
    // while it stands still, more happens than the system remembers, and what is of interest last
    apps.server.signal(Signal::STOP);
    for _ in 0..=queue / 2 {
        fs::write(apps.path("noise.txt"), "x").unwrap();
    }
    fs::remove_file(apps.path("noise.txt")).unwrap();
    apps.put("app.wasm", variant(HELLO_HTTP, 1));
    apps.put("new.wasm", guest(HELLO_HTTP));
    apps.server.signal(Signal::CONT);
    let live: BTreeSet<_> = (0..2).map(|_| event(&mut apps.server, "live")["app"].to_string()).collect();
    assert_eq!(live.into_iter().collect::<Vec<_>>(), ["\"app\"", "\"new\""]);
    // and it is heard again
    apps.live("app", variant(HELLO_HTTP, 2));
}

#[test]
fn the_folder_may_go_and_come_back() {
    let mut apps = Apps::new();
    apps.live("app", guest(HELLO_HTTP));
    // swapped for another in less time than it takes to notice
    let next = apps.folder.path("next");
    fs::create_dir(&next).unwrap();
    fs::write(next.join("app.wasm"), variant(HELLO_HTTP, 1)).unwrap();
    let load = Load::start_at(&apps.server, 4, "/app");
    load.until_more(20);
    fs::rename(apps.folder.path("apps"), apps.folder.path("old")).unwrap();
    fs::rename(&next, apps.folder.path("apps")).unwrap();
    apps.told("live", "app");
    load.stop().is_unharmed();
    // gone for good, and back
    fs::rename(apps.folder.path("apps"), &next).unwrap();
    apps.told("removed", "app");
    assert_eq!(apps.get("/app").status, 404);
    fs::rename(&next, apps.folder.path("apps")).unwrap();
    apps.told("live", "app");
    // and it is still watched
    apps.live("app", variant(HELLO_HTTP, 2));
}

#[test]
fn a_folder_without_events_is_looked_at() {
    let mut apps = Apps::with(|wrun| wrun.args(["--poll", "50ms"]));
    apps.live("app", guest(HELLO_HTTP));
    apps.live("app", variant(HELLO_HTTP, 1));
    fs::remove_file(apps.path("app.wasm")).unwrap();
    apps.told("removed", "app");
}

#[test]
fn a_kernel_without_events_is_none_that_wrun_needs() {
    let calls = [libc::SYS_inotify_init1, libc::SYS_inotify_init];
    let mut apps = Apps::with(|wrun| wrun.on_a_kernel_without(&calls));
    apps.live("app", guest(HELLO_HTTP));
    apps.live("app", variant(HELLO_HTTP, 1));
}

#[test]
fn a_hangup_lets_everything_be_tried_again() {
    let mut apps = Apps::new();
    apps.put("app.toml", "dir = ['../later::/data']\n");
    apps.put("app.wasm", guest(HELLO_HTTP));
    apps.told("refused", "app");
    fs::create_dir(apps.folder.path("later")).unwrap();
    apps.server.signal(Signal::HUP);
    apps.told("live", "app");
    assert_eq!(apps.get("/app").status, 200);
}

#[test]
fn many_files_may_come_at_once() {
    const MANY: usize = 1000;
    let mut apps = Apps::with(|wrun| wrun.arg("--lazy"));
    let echo = guest(ECHO);
    for number in 0..MANY {
        fs::write(apps.path(&format!("app{number}.wasm")), &echo).unwrap();
    }
    for _ in 0..MANY {
        event(&mut apps.server, "asleep");
    }
    eventually("all are listed", || apps.get("/").json()["apps"].as_array().unwrap().len() == MANY);
    for number in [0, 500, 999] {
        assert_eq!(apps.server.post(&format!("/app{number}"), "1").text(), "1");
    }
}

#[test]
fn more_apps_than_there_are_descriptors_for_are_refused_and_the_others_go_on() {
    const MANY: usize = 20;
    let apps = Apps::with(|wrun| wrun.open_files(110));
    for number in 0..MANY {
        apps.put(&format!("app{number}.wasm"), guest(ECHO));
    }
    let states = || {
        let list = apps.get("/").json();
        let apps = list["apps"].as_array().unwrap().iter();
        apps.map(|app| (app["name"].as_str().unwrap().to_owned(), app["state"] == "live", app.clone()))
            .collect::<Vec<_>>()
    };
    let is_settled = |(_, is_live, app): &(String, bool, Value)| *is_live || app["error"].is_string();
    eventually("each is live or was refused", || states().len() == MANY && states().iter().all(is_settled));
    let states = states();
    let live = states.iter().filter(|(_, is_live, _)| *is_live).count();
    assert!(0 < live && live < MANY, "{live} of {MANY}");
    for (name, is_live, app) in states {
        let answer = apps.server.post(&format!("/{name}"), "1");
        assert_eq!(answer.status, if is_live { 200 } else { 503 }, "{app}");
        assert!(is_live || app["error"].as_str().unwrap().contains("open files"), "{app}");
    }
}

#[test]
fn a_file_that_could_not_be_looked_at_is_not_gone() {
    let mut apps = Apps::new();
    apps.live("app", guest(ECHO));
    let pid = apps.server.pid();
    let taken = || {
        let fds = fs::read_dir(format!("/proc/{}/fd", pid.as_raw_pid())).unwrap();
        fds.map(|fd| fd.unwrap().file_name().to_str().unwrap().parse::<u64>().unwrap()).collect::<Vec<_>>()
    };
    apps.server.until_stable("nothing is under way", || format!("{:?}", taken()));
    let taken = taken();
    // enough for the folder, which takes two, and none for a file
    let most = (0..).filter(|fd| !taken.contains(fd)).nth(2);
    let before = getrlimit(Resource::Nofile);
    prlimit(Some(pid), Resource::Nofile, Rlimit { current: most, maximum: before.maximum }).unwrap();
    apps.put("other.wasm", guest(ECHO));
    let told = event(&mut apps.server, "error");
    assert_eq!(told["message"], "could not read the folder: Too many open files (os error 24)");
    prlimit(Some(pid), Resource::Nofile, before).unwrap();
    apps.told("live", "other");
    assert_eq!(events_of(apps, "removed").len(), 0);
}

#[test]
fn what_cannot_be_watched_is_told() {
    let folder = Folder::new().file("file", "");
    for path in ["nowhere", "file"] {
        let _ = folder.wrun(["watch", path, "--listen", "0"]).run().code(125).stderr_has("could not read the folder");
    }
    let apps = Apps::new();
    let taken = apps.server.address.to_string();
    let _ = apps.folder.wrun(["watch", "apps", "--listen", &taken]).run().code(98);
    let _ = folder.wrun(["watch", ".", "--poll", "1ms"]).run().code(2).stderr_has("expected 10ms or more");
    let _ =
        folder.wrun(["watch", ".", "--isolation", "thread"]).run().code(2).stderr_has("expected `process` or `jail`");
}
