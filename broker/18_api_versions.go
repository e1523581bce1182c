package broker

import "regexp"

// ApiVersions (18), versions 0-4: KIP-35, client software name and version from 3 (KIP-511). The answer's header is always version 0; an unknown version is
// answered with a version 0 body that lists this key only, so that the client can try again.

// softwareMax bounds the name of a client's software, which is kept as long as its connection.
const softwareMax = 255

var softwareName = regexp.MustCompile(`^[a-zA-Z0-9](?:[a-zA-Z0-9\-.]*[a-zA-Z0-9])?$`)

func handleAPIVersions(r *request) error {
	if r.version < r.api.min || r.version > r.api.max {
		w := &writer{b: make([]byte, 4, 32)}
		w.i32(r.corr)
		w.i16(codeUnsupportedVersion)
		w.i32(1)
		w.i16(keyAPIVersions)
		w.i16(r.api.min)
		w.i16(r.api.max)
		r.finish(w)
		return nil
	}
	code := codeNone
	if r.version >= 3 {
		name, version := r.str(), r.str()
		r.tags()
		if r.err == nil && (len(name) > softwareMax || len(version) > softwareMax || !softwareName.MatchString(name) || !softwareName.MatchString(version)) {
			code = codeInvalidRequest
		} else {
			r.c.name = name + "/" + version
		}
	}
	if r.err != nil {
		return r.err
	}
	w := r.respond(512)
	w.i16(code)
	list := apiList()
	if code != codeNone {
		list = nil
	}
	w.array(len(list))
	for _, a := range list {
		w.i16(a.key)
		w.i16(a.min)
		w.i16(a.max)
		w.tags()
	}
	if r.version >= 1 {
		w.i32(0)
	}
	w.tags()
	r.finish(w)
	return nil
}
