package objstore

import (
	"fmt"
	"net/url"
	"regexp"
	"strings"
)

// Location is a parsed storage URL.
type Location struct {
	Scheme   string // s3, file or mem
	Bucket   string // of s3
	Prefix   string // of s3, without slashes around it
	Dir      string // of file
	Region   string
	Endpoint string
	// PathStyle addresses the bucket in the path instead of in the host name.
	PathStyle bool
	// Provider is aws or s3compatible.
	Provider string
}

// bucketName is what S3 allows for a general purpose bucket.
var bucketName = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$`)

// ParseURL reads s3://bucket/prefix?region=&endpoint=&path_style=&provider=, file:///dir, file://./dir or mem://. Without an endpoint the provider is aws,
// with one it is s3compatible; provider= forces it. An unknown parameter is an error.
func ParseURL(s string) (Location, error) {
	var l Location
	rest, ok := strings.CutPrefix(s, "file://")
	if ok {
		if rest == "" || strings.ContainsAny(rest, "?#") {
			return l, fmt.Errorf("%q names no directory: write file:///dir or file://./dir", s)
		}
		return Location{Scheme: "file", Dir: rest}, nil
	}
	u, err := url.Parse(s)
	if err != nil {
		return l, fmt.Errorf("%q is not a storage URL: %v", Redact(s), err)
	}
	switch u.Scheme {
	case "mem":
		return Location{Scheme: "mem"}, nil
	case "s3":
	default:
		return l, fmt.Errorf("%q is not a storage URL: it begins with s3://, file:// or mem://", Redact(s))
	}
	if u.User != nil {
		return l, fmt.Errorf("%q holds credentials: give them in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)", Redact(s))
	}
	l = Location{Scheme: "s3", Bucket: u.Host, Prefix: strings.Trim(u.Path, "/")}
	if l.Bucket == "" {
		return l, fmt.Errorf("%q names no bucket", s)
	}
	if !bucketName.MatchString(l.Bucket) {
		return l, fmt.Errorf("%q: %q is no name of a bucket: 3 to 63 lower-case letters, digits, dots and hyphens", s, l.Bucket)
	}
	if l.Prefix != "" {
		if err := CheckKey(l.Prefix); err != nil {
			return l, fmt.Errorf("%q: %w", s, err)
		}
	}
	for k, v := range u.Query() {
		switch val := v[len(v)-1]; k {
		case "region":
			l.Region = val
		case "endpoint":
			l.Endpoint = val
		case "path_style":
			if val != "true" && val != "false" {
				return l, fmt.Errorf("%q: path_style is true or false", s)
			}
			l.PathStyle = val == "true"
		case "provider":
			l.Provider = val
		default:
			return l, fmt.Errorf("%q: unknown parameter %q; known are region, endpoint, path_style, provider", s, k)
		}
	}
	if e := l.Endpoint; e != "" {
		if u, err := url.Parse(e); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return l, fmt.Errorf("endpoint %q is not http://host:port or https://host:port", e)
		}
	}
	if l.Provider == "" {
		l.Provider = "aws"
		if l.Endpoint != "" {
			l.Provider = "s3compatible"
		}
	}
	if l.Provider != "aws" && l.Provider != "s3compatible" {
		return l, fmt.Errorf("%q: provider is aws or s3compatible", s)
	}
	if l.Provider == "s3compatible" && l.Endpoint == "" {
		return l, fmt.Errorf("%q: provider s3compatible needs an endpoint", s)
	}
	return l, nil
}

// Redact returns a URL without what stands before "@" in its host.
func Redact(s string) string {
	scheme, rest, ok := strings.Cut(s, "://")
	if !ok {
		return s
	}
	host, path, _ := strings.Cut(rest, "/")
	if i := strings.LastIndexByte(host, '@'); i >= 0 {
		return scheme + "://***@" + host[i+1:] + "/" + path
	}
	return s
}
