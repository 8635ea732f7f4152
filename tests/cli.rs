//! The command line of the real binary: exit statuses, one-line errors, configuration, pages.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn tidelog(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tidelog"))
        .args(arguments)
        .env_clear()
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Runs a command that must fail with status 1 and one line; the line.
fn failure(arguments: &[&str]) -> String {
    let output = tidelog(arguments);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
    assert_eq!(said.lines().count(), 1, "{arguments:?}: {said}");
    assert!(output.stdout.is_empty(), "{arguments:?}");
    said.strip_prefix("tidelog: ").expect("the program is named").trim_end().to_owned()
}

fn config(dir: &Path, more: &str) -> String {
    let path = dir.join("tidelog.toml");
    let shown = dir.display();
    let text = format!(
        "node = \"a\"\ndata_dir = \"{shown}/data\"\n{more}\n[control]\nsocket = \"{shown}/c.sock\"\n"
    );
    fs::write(&path, text).unwrap();
    path.display().to_string()
}

#[test]
fn wrong_usage_ends_with_2_and_help_with_0() {
    for wrong in [
        &["status", "a", "b"][..],
        &["volume", "create", "g/v"],
        &["volume", "create", "g", "--size", "1G"],
        &["volume", "create", "g/v", "--size", "1GB"],
        &["group", "create", "now"],
        &["replicate", "g"],
        &["replicate", "g", "--to", "b", "--mode", "magic"],
        &["bookmark", "g"],
        &["image", "close", "g"],
        &["no-such-command"],
        &[],
    ] {
        let output = tidelog(wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}: {}", text(&output.stderr));
        assert!(output.stdout.is_empty(), "{wrong:?}");
    }
    for right in [&["--help"][..], &["--version"], &["help", "volume"]] {
        let output = tidelog(right);
        assert_eq!(output.status.code(), Some(0), "{right:?}: {}", text(&output.stderr));
    }
}

#[test]
fn a_size_with_two_readings_is_refused_with_both() {
    let output = tidelog(&["volume", "create", "g/v", "--size", "10GB"]);
    let said = text(&output.stderr);
    assert!(said.contains("10737418240") && said.contains("10000000000"), "{said}");
}

#[test]
fn a_socket_that_is_not_there_names_it_and_how_to_start() {
    let said = failure(&["--socket", "/nonexistent/tidelog.sock", "status"]);
    assert!(said.contains("/nonexistent/tidelog.sock"), "{said}");
    assert!(said.contains("no such file") && said.contains("tidelog serve"), "{said}");
}

#[test]
fn a_wrong_key_names_its_line_and_the_nearest_key() {
    let dir = tempfile::tempdir().unwrap();
    let path = config(dir.path(), "[limits]\nlog_limits = \"1G\"\n");
    for command in ["check-config", "serve"] {
        let said = failure(&[command, "--config", &path]);
        assert_eq!(
            said,
            format!("{path}:4: unknown key `log_limits` in [limits]; the nearest is `log_limit`")
        );
    }
}

#[test]
fn a_configuration_is_checked_without_using_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = config(dir.path(), "");
    let output = tidelog(&["check-config", "--config", &path]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(!dir.path().join("data").exists());
    let open = config(dir.path(), "[[nbd]]\nlisten = \"tcp:0.0.0.0:10809\"\n");
    let said = failure(&["check-config", "--config", &open]);
    assert!(said.contains("tcp:0.0.0.0:10809") && said.contains("allow"), "{said}");
    let said = failure(&["check-config", "--config", "/nonexistent.toml"]);
    assert!(said.starts_with("/nonexistent.toml: could not be read: no such file"), "{said}");
}

#[test]
fn manual_pages_and_completions_cover_the_commands() {
    let dir = tempfile::tempdir().unwrap();
    let pages = dir.path().join("man");
    let output = tidelog(&["man", pages.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    for page in ["tidelog.1", "tidelog-status.1", "tidelog-volume-create.1"] {
        let page = fs::read_to_string(pages.join(page)).expect(page);
        assert!(page.starts_with(".ie") || page.contains(".TH"), "{page}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let output = tidelog(&["completions", shell]);
        assert!(text(&output.stdout).contains("replicate"), "{shell}");
    }
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_tidelog"))
        .args(["completions", "bash"])
        .env_clear()
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stderr.is_empty(), "{}", text(&output.stderr));
}

#[test]
fn the_unit_of_attach_calls_a_command_that_exists() {
    let unit = include_str!("../contrib/tidelog-attach@.service");
    let command = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    // The last device that the kernel's module makes: nobody begins there.
    let command = command
        .replace("%i", "nbd15")
        .replace("$VOLUME", "g/v")
        .replace("$SERVERS", "--to 127.0.0.1:9 --to localhost:9");
    let words: Vec<&str> = command.split_whitespace().collect();
    assert_eq!(words[0], "/usr/bin/tidelog");
    assert!(!command.contains(['$', '%']), "{command}");
    let said = failure(&words[1..]);
    // Where the kernel has the module, and permits it, the server is what is missing.
    let not_here = ["the kernel ", "cannot be kept: "];
    let not_here = not_here.map(|why| said.starts_with(&format!("device /dev/nbd15: {why}")));
    assert!(said.contains("127.0.0.1:9") || not_here.contains(&true), "{said}");
}
