//! Text in libvirt's definitions.

/// Text as it stands in an element or between quotes of either kind. What XML can't say, such as control characters, is refused by its
/// reader.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\'' => escaped.push_str("&apos;"),
            '"' => escaped.push_str("&quot;"),
            // In an attribute they would be read as spaces.
            '\t' | '\n' | '\r' => escaped.push_str(&format!("&#{};", u32::from(c))),
            _ => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_a_meaning_is_escaped() {
        assert_eq!(escape("a'/><b \"c\"&\n\t\r<ü>"), "a&apos;/&gt;&lt;b &quot;c&quot;&amp;&#10;&#9;&#13;&lt;ü&gt;");
    }
}
