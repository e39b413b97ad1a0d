#!/bin/sh
# make_certificates.sh FOLDER: what tests of TLS need, made anew, by the program openssl; 77: there is
# none. NAME.crt and NAME.key in FOLDER:
#
#   ca, stranger      two CAs
#   server            of ca, for localhost and 127.0.0.1 (and ::1)
#   named             of ca, for localhost alone, not for its addresses
#   elsewhere         of ca, for other.example and 192.0.2.1
#   expired           as server, until yesterday
#   alone             as server, signed by itself
#   client, unknown   of ca, of stranger: a client's
#
# Besides locked.key, which is client.key with a password; garbage, which is nothing of these; and
# empty.
folder=$1
command -v openssl >/dev/null 2>&1 || exit 77
cd "$folder" || exit 1
hosts='DNS:localhost,IP:127.0.0.1,IP:::1'

# request NAME: a key, and what is to be signed
request() {
    openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=kvtile $1" \
        -keyout "$1.key" -out "$1.csr"
}
# sign NAME CA DAYS EXTENSION...
sign() {
    name=$1 ca=$2 days=$3
    shift 3
    printf '%s\n' "$@" >"$name.ext"
    request "$name" &&
        if [ "$name" = "$ca" ]; then
            openssl x509 -req -in "$name.csr" -signkey "$name.key" -days "$days" -extfile "$name.ext" \
                -set_serial 1 -out "$name.crt"
        else
            openssl x509 -req -in "$name.csr" -CA "$ca.crt" -CAkey "$ca.key" -days "$days" \
                -extfile "$name.ext" -set_serial 2 -out "$name.crt"
        fi
}
make_all() {
    sign ca ca 30 basicConstraints=critical,CA:TRUE keyUsage=critical,keyCertSign &&
        sign stranger stranger 30 basicConstraints=critical,CA:TRUE keyUsage=critical,keyCertSign &&
        sign server ca 30 "subjectAltName=$hosts" &&
        sign named ca 30 subjectAltName=DNS:localhost &&
        sign elsewhere ca 30 subjectAltName=DNS:other.example,IP:192.0.2.1 &&
        sign expired ca -1 "subjectAltName=$hosts" &&
        sign alone alone 30 "subjectAltName=$hosts" &&
        sign client ca 30 extendedKeyUsage=clientAuth &&
        sign unknown stranger 30 extendedKeyUsage=clientAuth &&
        openssl pkey -in client.key -aes256 -passout pass:secret -out locked.key
}
make_all >log 2>&1 || { cat log; exit 1; }
echo 'neither a certificate nor a key' >garbage
: >empty
