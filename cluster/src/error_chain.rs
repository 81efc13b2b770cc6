//! An error with its causes as one line of text, for answers to people. Logs take the error itself.

/// The error and its causes, from the outside in, joined by colons. A cause that an outer error repeats
/// already is left out.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    for cause in std::iter::successors(error.source(), |cause| cause.source()) {
        let cause = cause.to_string();
        if !text.ends_with(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Layer {
        text: &'static str,
        source: Option<Box<Layer>>,
    }

    #[test]
    fn causes_follow_and_are_not_repeated() {
        let layer = |text, source: Option<Layer>| Layer { text, source: source.map(Box::new) };
        let io = || layer("connection refused", None);
        assert_eq!(error_chain(&io()), "connection refused");
        assert_eq!(
            error_chain(&layer("ask the server", Some(layer("connect", Some(io()))))),
            "ask the server: connect: connection refused"
        );
        assert_eq!(
            error_chain(&layer("connect: connection refused", Some(io()))),
            "connect: connection refused"
        );
    }
}
