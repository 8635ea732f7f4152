//! Holds the tree of packages against deny.toml: licences, sources, banned names.

use std::process::Command;

use serde_json::Value;

fn manifest_path(name: &str) -> String {
    format!("{}/{name}", env!("CARGO_MANIFEST_DIR"))
}

fn deny() -> toml::Table {
    std::fs::read_to_string(manifest_path("deny.toml")).unwrap().parse().unwrap()
}

fn strings(value: &toml::Value) -> Vec<String> {
    value.as_array().unwrap().iter().map(|item| item.as_str().unwrap().to_owned()).collect()
}

fn packages() -> Vec<Value> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--locked", "--offline", "--format-version", "1"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu", "--manifest-path"])
        .arg(manifest_path("Cargo.toml"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let all = metadata["packages"].as_array().unwrap().clone();
    all.into_iter().filter(|package| package["name"] != "tidelog").collect()
}

/// Whether a licence expression can be satisfied by the allowed ones alone. `/` is the old `OR`;
/// AND binds tighter than OR.
fn is_allowed(expression: &str, allowed: &[String]) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let result = any_of(&words, &mut at, allowed);
    result && at == words.len()
}

fn any_of(words: &[&str], at: &mut usize, allowed: &[String]) -> bool {
    let mut result = all_of(words, at, allowed);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        result |= all_of(words, at, allowed);
    }
    result
}

fn all_of(words: &[&str], at: &mut usize, allowed: &[String]) -> bool {
    let mut result = one(words, at, allowed);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        result &= one(words, at, allowed);
    }
    result
}

fn one(words: &[&str], at: &mut usize, allowed: &[String]) -> bool {
    let Some(word) = words.get(*at) else { return false };
    *at += 1;
    if *word == "(" {
        let result = any_of(words, at, allowed);
        let closed = words.get(*at) == Some(&")");
        *at += 1;
        return result && closed;
    }
    let mut licence = (*word).to_owned();
    if words.get(*at) == Some(&"WITH") {
        licence = format!("{licence} WITH {}", words.get(*at + 1).unwrap_or(&""));
        *at += 2;
    }
    allowed.contains(&licence)
}

#[test]
fn every_licence_is_allowed() {
    let deny = deny();
    let allowed = strings(&deny["licenses"]["allow"]);
    let refused: Vec<String> = packages()
        .iter()
        .filter(|package| !is_allowed(package["license"].as_str().unwrap_or(""), &allowed))
        .map(|package| {
            format!("{} {}: {}", package["name"], package["version"], package["license"])
        })
        .collect();
    assert!(refused.is_empty(), "deny.toml allows none of these\n{}", refused.join("\n"));
}

#[test]
fn every_package_comes_from_the_one_registry() {
    let packages = packages();
    let first = packages[0]["source"].as_str().unwrap_or("a path");
    for package in &packages {
        let source = package["source"].as_str().unwrap_or("a path");
        let known = source.starts_with("registry+") && source == first;
        assert!(known, "{}: comes from {source}", package["name"]);
    }
}

#[test]
fn no_banned_package_is_in_the_tree() {
    let deny = deny();
    let banned = deny["bans"]["deny"].as_array().unwrap();
    assert!(!banned.is_empty());
    for package in packages() {
        let name = package["name"].as_str().unwrap();
        let is_banned = banned.iter().any(|entry| entry["name"].as_str() == Some(name));
        assert!(!is_banned, "{name}: deny.toml says why not");
    }
}

#[test]
fn licence_expressions_are_read_as_they_are_meant() {
    let allowed = ["MIT".to_owned(), "ISC".to_owned(), "A WITH e".to_owned()];
    for good in ["MIT", "MIT/GPL-3.0", "GPL OR (MIT AND ISC)", "A WITH e", "GPL OR MIT AND ISC"] {
        assert!(is_allowed(good, &allowed), "{good}");
    }
    for bad in ["", "GPL", "MIT AND GPL", "A", "(MIT", "MIT ISC", "(GPL OR MIT) AND GPL"] {
        assert!(!is_allowed(bad, &allowed), "{bad}");
    }
}
