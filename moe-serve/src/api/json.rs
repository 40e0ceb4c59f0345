//! Bytes of a body to a JSON object, with bounds on depth and size checked before any tree is built.

use super::error::ApiError;
use super::limits::{MAX_JSON_DEPTH, MAX_JSON_VALUES};
use serde_json::{Map, Value};

/// Parses a request's body.
///
/// # Errors
/// 400, with the position, if it is not UTF-8, not JSON, too deep, has too many values, or is not an object.
pub(super) fn parse_object(body: &[u8]) -> Result<Map<String, Value>, ApiError> {
    let text = std::str::from_utf8(body).map_err(|e| {
        ApiError::invalid(None, format!("the body is not UTF-8: invalid byte at offset {}", e.valid_up_to()))
    })?;
    parse_text(text, &mut { MAX_JSON_VALUES })
}

/// Parses an object of at most `values_left` values, which then are fewer: one request may hold many of them as text.
pub(super) fn parse_text(text: &str, values_left: &mut usize) -> Result<Map<String, Value>, ApiError> {
    *values_left -= check_shape(text, *values_left)?;
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(ApiError::invalid(None, "the body should be a JSON object")),
        Err(error) => Err(ApiError::invalid(None, format!("the body is not valid JSON: {error}"))),
    }
}

/// Counts brackets and commas outside strings: a tree takes tens of bytes per value, so `[1,1,...]` would grow manyfold.
fn check_shape(text: &str, max_values: usize) -> Result<usize, ApiError> {
    let too_many =
        || ApiError::invalid(None, format!("the JSON has more than {MAX_JSON_VALUES} values; split the request"));
    let (mut depth, mut values, mut in_string, mut escaped) = (0usize, 1usize, false, false);
    for (offset, byte) in text.bytes().enumerate() {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'[' | b'{' => {
                depth += 1;
                values += 1;
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            b',' => values += 1,
            _ => {}
        }
        if depth > MAX_JSON_DEPTH {
            let text = format!("the JSON is nested deeper than {MAX_JSON_DEPTH} levels at byte {offset}");
            return Err(ApiError::invalid(None, text));
        }
        if values > max_values {
            return Err(too_many());
        }
    }
    if values > max_values { Err(too_many()) } else { Ok(values) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(body: &[u8], want: &str) {
        let message = parse_object(body).expect_err("refused").message;
        assert!(message.contains(want), "{message:?} does not contain {want:?}");
    }

    #[test]
    fn errors_name_the_position() {
        check(b"{\"a\": 1,\n \"b\" 2}", "line 2 column 6");
        check(b"{\"a\": \"\xff\"}", "offset 7");
        check(b"[]", "object");
        check(b"", "EOF");
        check(b"{} x", "trailing");
    }

    #[test]
    fn shape_is_bounded_before_parsing() {
        check("[".repeat(1 << 20).as_bytes(), "deeper than 48");
        check(format!("{{\"a\":[{}1]}}", "1,".repeat(MAX_JSON_VALUES)).as_bytes(), "more than");
    }

    #[test]
    fn texts_inside_of_a_request_share_one_bound() {
        let mut left = 10;
        assert!(parse_text("{\"a\": [1, 2, 3]}", &mut left).is_ok());
        assert_eq!(left, 5);
        let error = parse_text("{\"a\": [1, 2, 3, 4]}", &mut left).expect_err("refused").message;
        assert!(error.contains("more than"), "{error}");
        assert_eq!(left, 5);
        assert!(parse_text("{}", &mut left).is_ok());
    }

    #[test]
    fn brackets_in_strings_do_not_count() {
        let body = format!("{{\"a\": \"{}\\\"[\"}}", "[{,".repeat(MAX_JSON_VALUES));
        assert!(parse_object(body.as_bytes()).is_ok());
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_an_object_or_an_error(body: Vec<u8>, text in "[\\[\\]{}\",:\\\\ 0-9a-z]{0,60}") {
            for body in [body.as_slice(), text.as_bytes()] {
                let reference = serde_json::from_slice::<Map<String, Value>>(body);
                assert_eq!(parse_object(body).is_ok(), reference.is_ok());
            }
        }
    }
}
