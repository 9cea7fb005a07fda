//! What docs/SECURITY.md promises is shown by tests that exist.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::path::Path;

/// A guarantee's row: its number, and each test as file and function.
struct Guarantee {
    number: usize,
    tests: Vec<(String, String)>,
}

fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// The rows of the table of guarantees. A file in backticks is followed by its functions in parentheses.
fn guarantees(document: &str) -> Vec<Guarantee> {
    let section = document.split("\n## Guarantees\n").nth(1).expect("a section of guarantees");
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| ")).filter_map(|line| {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let number = cells.first()?.parse().ok()?;
        let [_, promise, shown] = cells[..] else { panic!("not three cells: {line}") };
        assert!(!promise.is_empty(), "{number} promises nothing");
        Some(Guarantee { number, tests: tests(shown) })
    });
    rows.collect()
}

fn tests(shown: &str) -> Vec<(String, String)> {
    let mut tests = Vec::new();
    let mut file = None;
    for quoted in shown.split('`').skip(1).step_by(2) {
        if quoted.contains('/') {
            file = Some((quoted, tests.len()));
            continue;
        }
        let (path, _) = file.unwrap_or_else(|| panic!("{quoted} is of no file"));
        tests.push((path.to_owned(), quoted.to_owned()));
    }
    let (last, before) = file.expect("no file is named");
    assert!(tests.len() > before, "no function of {last} is named");
    tests
}

/// Whether a function stands there and is run as a test: one of `#[test]`, which may be inside `proptest!`.
fn is_test(source: &str, function: &str) -> bool {
    let Some(at) = source.find(&format!("fn {function}(")) else { return false };
    let attributes = source[..at].trim_end().lines().rev().map(str::trim);
    let mut attributes = attributes.take_while(|line| line.starts_with("#[") || line.starts_with("//"));
    attributes.any(|line| line == "#[test]")
}

#[test]
fn every_guarantee_names_tests_that_exist() {
    let document = fs::read_to_string(workspace().join("docs/SECURITY.md")).unwrap();
    let guarantees = guarantees(&document);
    let numbers: Vec<_> = guarantees.iter().map(|guarantee| guarantee.number).collect();
    assert_eq!(numbers, (1..=guarantees.len()).collect::<Vec<_>>());
    assert!(guarantees.len() >= 24, "guarantees went missing: {}", guarantees.len());
    for Guarantee { number, tests } in &guarantees {
        for (file, function) in tests {
            let source = fs::read_to_string(workspace().join(file))
                .unwrap_or_else(|e| panic!("guarantee {number} names {file}: {e}"));
            assert!(is_test(&source, function), "guarantee {number} names {function}, which is no test of {file}");
        }
    }
    // The table of who can do what leads to guarantees that are there.
    let whom = document.split("\n## From whom\n").nth(1).unwrap().split("\n## ").next().unwrap();
    let rows = whom.lines().filter(|line| line.starts_with("| ")).skip(2);
    let mut led_to: Vec<usize> = Vec::new();
    for row in rows {
        let last = row.trim_end_matches(" |").rsplit(" | ").next().unwrap();
        led_to.extend(last.split(", ").map(|number| number.parse::<usize>().unwrap_or_else(|e| panic!("{row}: {e}"))));
    }
    assert!(!led_to.is_empty() && led_to.iter().all(|number| numbers.contains(number)), "{led_to:?}");
}

#[test]
fn what_is_missing_is_noticed() {
    let source = "#[test]\nfn one() {}\n\nfn helper() {}\n\n    #[test]\n    #[ignore]\n    fn two(a: u8) {}\n";
    assert!(is_test(source, "one") && is_test(source, "two"));
    assert!(!is_test(source, "helper") && !is_test(source, "three") && !is_test(source, "on"));
    let named = tests("`a/b.rs` (`one`, `two`); each: `c/d.rs` (`three`)");
    let named: Vec<_> = named.iter().map(|(file, function)| (file.as_str(), function.as_str())).collect();
    assert_eq!(named, [("a/b.rs", "one"), ("a/b.rs", "two"), ("c/d.rs", "three")]);
    assert!(std::panic::catch_unwind(|| tests("`a/b.rs`")).is_err(), "a file without functions is no proof");
}
