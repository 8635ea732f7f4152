//! Keeps the house in order: floors, module docs, bans, file sizes, and pages that name the rooms.
//!
//! The rules are data at the top of this file; each test reads the sources and prints every
//! offence as `file:line: what; what to do instead`. The tests at the end break each rule on
//! purpose, so that a check that sees nothing is noticed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

/// The rooms of the library, lowest floor first. A room may name rooms of lower floors and its
/// neighbours on the same floor, never a higher one.
const FLOORS: &[&[&str]] = &[
    &["units", "events"],
    &["io"],
    &["config"],
    &["log"],
    &["extent_map", "base"],
    &["group"],
    &["nbd", "replication"],
    &["backup", "agent"],
    &["control"],
    &["node"],
];

/// Walls beyond the floors: who, what it must not name, why.
const WALLS: &[(&str, &str, &str)] = &[
    ("units", "events", "units are numbers and names, they report nothing"),
    ("extent_map", "log", "the map stores positions, it never decodes a record"),
    ("extent_map", "base", "what the map lacks is in the base; the engine joins the two"),
    ("base", "log", "the base holds blocks and opaque control entries"),
    ("base", "extent_map", "the engine plans a fold, the base only writes it"),
    ("nbd", "replication", "hosts are served alike with and without a peer"),
    ("replication", "nbd", "peers get log bytes, not requests"),
    ("agent", "backup", "the agent tells facts, it does not know who asks"),
];

/// What the binary's `cli` may name of the library: it talks to the control socket.
const CLI_MAY_USE: &[&str] = &["control", "config", "events", "io", "nbd", "node", "units"];

/// Words that must not be in sources, with what to do instead.
const BANNED_WORDS: &[(&str, &str)] = &[
    ("FIXME", "mend it, or file an issue"),
    ("XXX", "say what is meant"),
    ("TODO", "do it, or file an issue"),
    ("HACK", "say what forces it"),
];

/// Calls that must not be in the library, with what to do instead.
const BANNED_CALLS: &[(&str, &str)] = &[
    ("println!", "return the text, or use tracing; only cli prints"),
    ("eprintln!", "return the text, or use tracing; only cli prints"),
    ("print!", "return the text, or use tracing; only cli prints"),
    ("eprint!", "return the text, or use tracing; only cli prints"),
    ("dbg!", "use tracing"),
    ("todo!", "build it or leave it out"),
    ("unimplemented!", "build it or leave it out"),
    ("process::exit", "return an error; only main ends the process"),
];

const COLUMNS_MAX: usize = 100;
const LINES_MAX: usize = 1000;
/// From here on a file must be in [`LONG_FILES`].
const LINES_ASKED: usize = 600;

/// Files above 600 lines, each with its reason. An entry that is no longer needed is an offence.
const LONG_FILES: &[(&str, &str)] = &[
    (
        "src/base/volume.rs",
        "image and sidecar are written in one order, which is read in one place",
    ),
    ("src/extent_map/mod.rs", "the map's operations over chunks, each with its bound"),
    ("src/backup/repository.rs", "a repository through the library: made, opened, written"),
    ("src/group/engine.rs", "what the group's mutex guards, in one view"),
    ("src/io/memory.rs", "the fault model of the disk, part by part"),
    ("src/control/route.rs", "the table of routes"),
    ("src/replication/cluster.rs", "the simulated world of the core's tests, whole"),
    ("src/group/tests/resync.rs", "one pair of nodes, and every way an image can end"),
    ("src/replication/core.rs", "the state machine's inputs, one by one"),
    ("src/replication/wire.rs", "the whole wire in one file"),
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Files below `dir` with one of the endings, as (path from the root, text), sorted.
fn files(dir: &str, endings: &[&str]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut pending = vec![root().join(dir)];
    while let Some(dir) = pending.pop() {
        let Ok(entries) = fs::read_dir(&dir) else { continue };
        for entry in entries {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                if !matches!(name.as_str(), "target" | "corpus" | "artifacts") {
                    pending.push(path);
                }
            } else if endings.iter().any(|ending| name.ends_with(ending)) {
                let text = fs::read_to_string(&path).unwrap();
                let short = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
                found.push((short, text));
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "no {endings:?} below {dir}/");
    found
}

fn rust_files() -> Vec<(String, String)> {
    let mut all = files("src", &[".rs"]);
    all.extend(files("tests", &[".rs"]));
    for dir in ["benches", "fuzz"] {
        if root().join(dir).exists() {
            all.extend(files(dir, &[".rs"]));
        }
    }
    all
}

fn is_library(path: &str) -> bool {
    path.starts_with("src/") && path != "src/main.rs" && !path.starts_with("src/cli/")
}

/// The same text with comments, strings and characters blanked, line for line.
fn code_only(text: &str) -> String {
    let bytes: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    let keep_lines = |range: &[char], out: &mut String| {
        out.extend(range.iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
    };
    while at < bytes.len() {
        let rest = &bytes[at..];
        let length = match rest {
            ['/', '/', ..] => rest.iter().position(|c| *c == '\n').unwrap_or(rest.len()),
            ['/', '*', ..] => block_comment(rest),
            ['r' | 'b' | 'c', ..] if !at.checked_sub(1).is_some_and(|i| is_word(bytes[i])) => {
                prefixed_string(rest)
            }
            ['"', ..] => string(rest),
            ['\'', ..] => character(rest),
            _ => 0,
        };
        if length == 0 {
            out.push(rest[0]);
            at += 1;
        } else {
            keep_lines(&rest[..length], &mut out);
            at += length;
        }
    }
    out
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn block_comment(rest: &[char]) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at + 1 < rest.len() {
        match (rest[at], rest[at + 1]) {
            ('/', '*') => (depth, at) = (depth + 1, at + 2),
            ('*', '/') => {
                (depth, at) = (depth - 1, at + 2);
                if depth == 0 {
                    return at;
                }
            }
            _ => at += 1,
        }
    }
    rest.len()
}

fn string(rest: &[char]) -> usize {
    let mut at = 1;
    while at < rest.len() {
        match rest[at] {
            '\\' => at += 2,
            '"' => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

/// `'x'`, `'\\n'`, `'\\u{1f}'`; 0 where it is a lifetime.
fn character(rest: &[char]) -> usize {
    match rest {
        ['\'', '\\', _, more @ ..] => {
            3 + more.iter().position(|c| *c == '\'').map_or(more.len(), |i| i + 1)
        }
        ['\'', _, '\'', ..] => 3,
        _ => 0,
    }
}

/// `r"…"`, `r#"…"#`, `b"…"`, `c"…"`, `br#"…"#`, `b'x'`; 0 where it is a plain word.
fn prefixed_string(rest: &[char]) -> usize {
    let prefix = rest.iter().take_while(|c| matches!(c, 'r' | 'b' | 'c')).count();
    let hashes = rest[prefix..].iter().take_while(|c| **c == '#').count();
    match rest.get(prefix + hashes) {
        Some('"') if rest[..prefix].contains(&'r') => {
            let mut at = prefix + hashes + 1;
            while at < rest.len() {
                let closed = rest[at] == '"'
                    && rest[at + 1..].iter().take_while(|c| **c == '#').count() >= hashes;
                at += 1;
                if closed {
                    return at + hashes;
                }
            }
            rest.len()
        }
        Some('"') if hashes == 0 => prefix + string(&rest[prefix..]),
        Some('\'') if rest[..prefix] == ['b'] => 1 + character(&rest[1..]),
        _ => 0,
    }
}

/// One token with the line it is on.
#[derive(Clone, Debug, PartialEq)]
enum Token {
    Word(String),
    Path,
    Punct(char),
}

fn tokens(code: &str) -> Vec<(usize, Token)> {
    let mut out = Vec::new();
    for (index, line) in code.lines().enumerate() {
        let chars: Vec<char> = line.chars().collect();
        let mut at = 0;
        while at < chars.len() {
            if is_word(chars[at]) {
                let end = (at..chars.len()).find(|i| !is_word(chars[*i])).unwrap_or(chars.len());
                out.push((index + 1, Token::Word(chars[at..end].iter().collect())));
                at = end;
            } else if chars[at..].starts_with(&[':', ':']) {
                out.push((index + 1, Token::Path));
                at += 2;
            } else {
                if !chars[at].is_whitespace() {
                    out.push((index + 1, Token::Punct(chars[at])));
                }
                at += 1;
            }
        }
    }
    out
}

/// The module that a file is: `src/io/disk.rs` is `["io", "disk"]`.
fn module_of(path: &str) -> Vec<String> {
    let inner = path.trim_start_matches("src/").trim_end_matches(".rs");
    inner.split('/').filter(|part| *part != "mod" && *part != "lib").map(str::to_owned).collect()
}

/// Every room of the library that a file names, with the line: by `crate::`, by `super::` that
/// climbs out of its room, or (in the binary) by `tidelog::`; in use lists and in plain paths.
fn rooms_named(path: &str, text: &str) -> Vec<(usize, String)> {
    let tokens = tokens(&code_only(text));
    let word = |at: usize| match tokens.get(at) {
        Some((_, Token::Word(word))) => Some(word.as_str()),
        _ => None,
    };
    let mut module = module_of(path);
    let mut depth = 0usize;
    let mut opened: Vec<usize> = Vec::new();
    let mut named = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let follows_path = at > 0 && tokens[at - 1].1 == Token::Path;
        match &tokens[at].1 {
            Token::Punct('{') => depth += 1,
            Token::Punct('}') => {
                depth = depth.saturating_sub(1);
                if opened.last() == Some(&depth) {
                    opened.pop();
                    module.pop();
                }
            }
            Token::Word(w)
                if w == "mod" && tokens.get(at + 2).is_some_and(|t| t.1 == Token::Punct('{')) =>
            {
                module.extend(word(at + 1).map(str::to_owned));
                opened.push(depth);
            }
            Token::Word(w)
                if !follows_path && matches!(w.as_str(), "crate" | "super" | "tidelog") =>
            {
                let mut base = if w == "super" { module.clone() } else { Vec::new() };
                let mut next = at;
                while word(next) == Some("super") {
                    base.pop();
                    next += 2;
                }
                if w != "super" {
                    next += 2;
                }
                let is_path = tokens.get(next - 1).is_some_and(|t| t.1 == Token::Path);
                let outside = w == "tidelog" && is_library(path);
                if is_path && !outside && base.is_empty() {
                    first_words(&tokens, next, &mut named);
                }
                at = next;
                continue;
            }
            _ => {}
        }
        at += 1;
    }
    named
}

/// The first word of a path, or of each path in a brace list.
fn first_words(tokens: &[(usize, Token)], at: usize, named: &mut Vec<(usize, String)>) {
    match &tokens[at..] {
        [(line, Token::Word(word)), ..] => named.push((*line, word.clone())),
        [(_, Token::Punct('{')), rest @ ..] => {
            let mut depth = 1;
            let mut fresh = true;
            for (line, token) in rest {
                match token {
                    Token::Punct('{') => depth += 1,
                    Token::Punct('}') => depth -= 1,
                    Token::Punct(',') if depth == 1 => fresh = true,
                    Token::Word(word) if fresh => {
                        named.push((*line, word.clone()));
                        fresh = false;
                    }
                    _ => {}
                }
                if depth == 0 {
                    return;
                }
            }
        }
        _ => {}
    }
}

fn floor_of(room: &str) -> Option<usize> {
    FLOORS.iter().position(|floor| floor.contains(&room))
}

/// Every wall that a file breaks, one line each.
fn broken_walls(path: &str, text: &str) -> Vec<String> {
    let module = module_of(path);
    let in_binary = path.starts_with("src/cli/");
    let own = module.first().map(String::as_str).unwrap_or("");
    let mut broken = Vec::new();
    for (line, room) in rooms_named(path, text) {
        let Some(target) = floor_of(&room) else { continue };
        if in_binary {
            if !CLI_MAY_USE.contains(&room.as_str()) {
                broken.push(format!("{path}:{line}: cli names {room}; ask the control socket"));
            }
            continue;
        }
        let Some(floor) = floor_of(own) else { continue };
        if target > floor {
            broken.push(format!(
                "{path}:{line}: {own} (floor {floor}) names {room} (floor {target}); a room uses \
                 only what stands below it"
            ));
        }
        if let Some((_, _, why)) = WALLS.iter().find(|(who, what, _)| *who == own && *what == room)
        {
            broken.push(format!("{path}:{line}: {own} must not name {room}: {why}"));
        }
    }
    broken
}

/// Fails with all offences, if there is one.
fn hold(offences: Vec<String>) {
    let mut text = String::new();
    for offence in &offences {
        writeln!(text, "{offence}").unwrap();
    }
    assert!(offences.is_empty(), "{} offences\n{text}", offences.len());
}

#[test]
fn no_room_names_a_higher_floor() {
    let mut offences = Vec::new();
    for (path, text) in files("src", &[".rs"]) {
        offences.extend(broken_walls(&path, &text));
    }
    hold(offences);
}

#[test]
fn every_room_has_a_floor_and_every_floor_its_rooms() {
    let library = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let declared: BTreeSet<&str> = library
        .lines()
        .filter_map(|line| line.trim().strip_prefix("pub mod ")?.strip_suffix(';'))
        .collect();
    let floors: BTreeSet<&str> = FLOORS.iter().flat_map(|floor| floor.iter().copied()).collect();
    assert_eq!(declared, floors, "src/lib.rs and FLOORS differ");
}

#[test]
fn every_file_opens_with_what_it_owns() {
    let offences = rust_files()
        .into_iter()
        .filter(|(_, text)| !text.lines().next().is_some_and(|line| line.starts_with("//! ")))
        .map(|(path, _)| format!("{path}:1: the first line is `//!` and says what the file owns"))
        .collect();
    hold(offences);
}

#[test]
fn lines_have_at_most_100_columns_but_for_strings() {
    let mut offences = Vec::new();
    for (path, text) in rust_files() {
        for (index, line) in text.lines().enumerate() {
            let columns = line.chars().count();
            // rustfmt keeps code; a string that cannot be broken is not worth its escapes.
            let is_comment = line.trim_start().starts_with("//");
            let is_exempt = line.contains("https://") || (!is_comment && line.contains('"'));
            if columns > COLUMNS_MAX && !is_exempt {
                offences.push(format!("{path}:{}: {columns} columns", index + 1));
            }
        }
    }
    hold(offences);
}

/// Offences against the two lists of bans in one file.
fn banned(path: &str, text: &str) -> Vec<String> {
    let mut offences = Vec::new();
    let code = code_only(text);
    let lines = text.lines().zip(code.lines());
    for (index, (line, code_line)) in lines.enumerate() {
        let at = index + 1;
        for (word, instead) in BANNED_WORDS {
            let hit = line.match_indices(word).any(|(i, _)| {
                !line[..i].chars().next_back().is_some_and(is_word)
                    && !line[i + word.len()..].chars().next().is_some_and(is_word)
            });
            if hit {
                offences.push(format!("{path}:{at}: {word}; {instead}"));
            }
        }
        if !is_library(path) {
            continue;
        }
        for (call, instead) in BANNED_CALLS {
            let hit = code_line
                .match_indices(call)
                .any(|(i, _)| !code_line[..i].chars().next_back().is_some_and(is_word));
            if hit {
                offences.push(format!("{path}:{at}: {call}; {instead}"));
            }
        }
    }
    offences
}

#[test]
fn nothing_banned_is_left_in_the_sources() {
    let tidy = "tests/tidy.rs";
    let all = rust_files().into_iter().filter(|(path, _)| path != tidy);
    hold(all.flat_map(|(path, text)| banned(&path, &text)).collect());
}

#[test]
fn every_file_of_tests_is_a_module_of_the_one_binary() {
    let main = fs::read_to_string(root().join("tests/main.rs")).unwrap();
    let declared: BTreeSet<String> = main
        .lines()
        .filter_map(|line| line.trim().strip_prefix("mod ")?.strip_suffix(';'))
        .map(str::to_owned)
        .collect();
    let mut offences = Vec::new();
    for entry in fs::read_dir(root().join("tests")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let is_module = path.extension().is_some_and(|e| e == "rs") || path.join("mod.rs").exists();
        if is_module && name != "main" && !declared.contains(&name) {
            offences.push(format!("tests/{name}: never runs; add `mod {name};` to tests/main.rs"));
        }
    }
    hold(offences);
}

#[test]
fn files_stay_short() {
    let mut offences = Vec::new();
    let allowed: BTreeMap<&str, &str> = LONG_FILES.iter().copied().collect();
    for (path, text) in rust_files() {
        let lines = text.lines().count();
        let listed = allowed.contains_key(path.as_str());
        if lines > LINES_MAX {
            offences.push(format!("{path}: {lines} lines; split it by mechanism"));
        } else if lines > LINES_ASKED && !listed && path != "tests/tidy.rs" {
            offences.push(format!("{path}: {lines} lines; split it, or give LONG_FILES a reason"));
        } else if lines <= LINES_ASKED && listed {
            offences.push(format!("{path}: {lines} lines; take it off LONG_FILES"));
        }
    }
    hold(offences);
}

#[test]
fn the_architecture_page_and_the_sources_name_the_same_files() {
    let page = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    hold(page_offences(&page, &files("src", &[".rs"])));
}

/// Rooms that the page forgets, and paths on the page that do not exist.
fn page_offences(page: &str, sources: &[(String, String)]) -> Vec<String> {
    let rooms: BTreeSet<String> = sources
        .iter()
        .filter_map(|(path, _)| match path.trim_start_matches("src/").split_once('/') {
            Some((room, _)) => Some(format!("{room}/")),
            None if path.ends_with("lib.rs") || path.ends_with("main.rs") => None,
            None => Some(path.trim_start_matches("src/").to_owned()),
        })
        .collect();
    let mut offences: Vec<String> = rooms
        .iter()
        .filter(|room| {
            let word = room.trim_end_matches('/').trim_end_matches(".rs");
            !page.contains(&format!("`{word}`")) && !page.contains(room.as_str())
        })
        .map(|room| format!("ARCHITECTURE.md: src/{room}: is not on the page; give it a line"))
        .collect();
    for (index, line) in page.lines().enumerate() {
        for quoted in line.split('`').skip(1).step_by(2) {
            let is_path = ["src/", "tests/", "scripts/", "docs/"]
                .iter()
                .any(|dir| quoted.starts_with(dir) && !quoted.contains(['*', ' ', '{', '<']));
            if is_path && !root().join(quoted).exists() {
                offences.push(format!("ARCHITECTURE.md:{}: {quoted}: no such file", index + 1));
            }
        }
    }
    offences
}

/// Codes of events that ask something of an operator, as the sources emit them.
#[test]
fn every_event_that_asks_for_something_is_on_the_page_for_trouble() {
    let page = fs::read_to_string(root().join("docs/trouble.md")).unwrap();
    let mut offences = Vec::new();
    for (path, text) in files("src", &[".rs"]) {
        let text = text.split("#[cfg(test)]").next().unwrap_or_default();
        for severity in ["Severity::Warning", "Severity::Error"] {
            for (at, _) in text.match_indices(severity) {
                let mut end = (at + 120).min(text.len());
                while !text.is_char_boundary(end) {
                    end -= 1;
                }
                let Some(code) = text[at..end].split('"').nth(1) else { continue };
                let is_code = code.contains('-') || code == "degraded";
                let is_code =
                    is_code && code.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
                if is_code && !page.contains(&format!("`{code}`")) {
                    offences.push(format!("{path}: event `{code}` is not in docs/trouble.md"));
                }
            }
        }
    }
    hold(offences);
}

#[test]
fn every_proof_applies_to_the_sources_and_names_a_test() {
    let tests: String =
        files("src", &[".rs"]).into_iter().chain(files("tests", &[".rs"])).map(|it| it.1).collect();
    let mut offences = Vec::new();
    for (path, text) in files("docs/proofs", &[".patch"]) {
        let check = std::process::Command::new("git")
            .args(["apply", "--check"])
            .arg(root().join(&path))
            .current_dir(root())
            .output()
            .unwrap();
        if !check.status.success() {
            offences.push(format!("{path}: {}", String::from_utf8_lossy(&check.stderr).trim()));
        }
        let test = text.lines().find_map(|line| line.strip_prefix("Test: ")).unwrap_or_default();
        let known = if text.contains("\nSuite: clients\n") {
            root().join(format!("tests/clients/{test}.sh")).exists()
        } else if text.contains("\nSuite: sim\n") {
            test.starts_with("scripts/sim --seed ")
        } else {
            tests.contains(&format!("fn {test}("))
        };
        if test.is_empty() || !known {
            offences.push(format!("{path}: no test is called `{test}`"));
        }
    }
    hold(offences);
}

#[test]
fn every_dependency_says_what_it_saves() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    hold(silent_dependencies(&manifest));
}

/// Dependencies without a comment above them (two lines may share one).
fn silent_dependencies(manifest: &str) -> Vec<String> {
    let mut offences = Vec::new();
    let mut inside = false;
    let mut explained = false;
    for (index, line) in manifest.lines().enumerate() {
        if line.starts_with('[') {
            inside = line.ends_with("dependencies]");
            explained = false;
        } else if line.starts_with('#') {
            explained = true;
        } else if inside && line.contains('=') {
            let name = line.split('=').next().unwrap_or_default().trim();
            if !explained && !name.starts_with("serde") {
                offences.push(format!("Cargo.toml:{}: {name}: say what it saves", index + 1));
            }
            explained = false;
        }
    }
    offences
}

#[test]
fn one_crypto_provider_is_in_the_tree() {
    let lock = fs::read_to_string(root().join("Cargo.lock")).unwrap();
    let names: BTreeSet<&str> =
        lock.lines().filter_map(|line| line.strip_prefix("name = \"")?.strip_suffix('"')).collect();
    assert!(names.contains("ring"), "Cargo.lock names no ring");
    for other in ["aws-lc-rs", "aws-lc-sys", "openssl-sys", "native-tls"] {
        assert!(!names.contains(other), "{other}: a second crypto provider; trim its features");
    }
}

mod teeth {
    //! Each rule broken on purpose.

    use super::*;

    #[test]
    fn a_broken_floor_is_seen_however_it_is_written() {
        for text in [
            "use crate::replication::Status;",
            "use crate::{units::Lsn, replication};",
            "use crate::{\n    units,\n    nbd::{self, Client},\n};",
            "fn f() { let x = crate::control::api::X::default(); }",
            "use super::super::nbd::Client;",
            "mod tests {\n    use super::super::super::nbd::Client;\n}",
        ] {
            let broken = broken_walls("src/log/reader.rs", text);
            assert_eq!(broken.len(), 1, "{text}: {broken:?}");
            assert!(broken[0].contains("log (floor 3) names"), "{broken:?}");
        }
    }

    #[test]
    fn a_broken_wall_on_one_floor_is_seen() {
        let broken = broken_walls("src/nbd/session.rs", "\nuse crate::replication::Peer;\n");
        assert_eq!(broken.len(), 1, "{broken:?}");
        assert!(broken[0].starts_with("src/nbd/session.rs:2: nbd must not name replication"));
        let above_and_walled = broken_walls("src/agent/facts.rs", "use crate::backup::Facts;");
        assert_eq!(above_and_walled.len(), 1, "{above_and_walled:?}");
        let cli = broken_walls("src/cli/volume.rs", "use tidelog::group::Group;");
        assert_eq!(cli, ["src/cli/volume.rs:1: cli names group; ask the control socket"]);
    }

    #[test]
    fn what_stands_below_and_what_is_only_said_is_allowed() {
        for text in [
            "use crate::{units::{Lsn, replication}, io::Env};",
            "//! See [`crate::nbd::Client`].\nuse super::record::flags;",
            "const T: &str = \"use crate::control::api;\";",
            "const T: &str = r#\"crate::node \" crate::nbd\"#; // crate::nbd\n/* crate::nbd */",
            "mod tests {\n    use super::*;\n    use super::super::record::Header;\n}",
        ] {
            assert_eq!(broken_walls("src/log/reader.rs", text), Vec::<String>::new(), "{text}");
        }
    }

    #[test]
    fn quotes_and_lifetimes_do_not_hide_code() {
        let code = code_only("fn f<'a>(c: char) -> &'a str { if c == '\"' { x } crate::nbd::f() }");
        assert!(code.contains("crate::nbd"), "{code}");
        let bytes = code_only("match b { b'\"' => 1, b'\\'' => 2, b'/' => crate::nbd::f(), }");
        assert!(bytes.contains("crate::nbd"), "{bytes}");
        let chars = code_only("match c { '\\'' => 1, '\\n' => 2, '\\u{1f}' => crate::nbd::f() }");
        assert!(chars.contains("crate::nbd"), "{chars}");
    }

    #[test]
    fn bans_bite() {
        let marker = ["FIX", "ME"].concat();
        assert_eq!(banned("src/nbd/wire.rs", &format!("// {marker}: later")).len(), 1);
        assert_eq!(banned("src/nbd/wire.rs", "fn f() { println!(\"x\"); }").len(), 1);
        assert_eq!(banned("src/nbd/wire.rs", "fn f() { eprintln!(\"x\"); }").len(), 1);
        assert_eq!(banned("src/cli/status.rs", "fn f() { println!(\"x\"); }").len(), 0);
        assert_eq!(banned("src/nbd/wire.rs", "// never println! here").len(), 0);
    }

    #[test]
    fn a_forgotten_room_and_a_dead_path_are_seen() {
        let sources = [("src/nbd/wire.rs".to_owned(), String::new())];
        let offences = page_offences("- `src/nowhere.rs` is gone", &sources);
        assert_eq!(offences.len(), 2, "{offences:?}");
    }

    #[test]
    fn a_silent_dependency_is_seen() {
        let manifest = "[dependencies]\n# Saves much.\na = \"1\"\nb = \"1\"\n";
        assert_eq!(silent_dependencies(manifest), ["Cargo.toml:4: b: say what it saves"]);
    }
}
