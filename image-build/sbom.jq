# A bill of materials (CycloneDX 1.6) from mkosi's manifest of Debian packages and pip's list of Python packages.
# Packages of which the build took every file away again ($gone) are not in it; mkosi's manifest lists them.
# Names, versions and package URLs (purl), in order, without a random serial number: the same for the same contents.

def debian: $debian[0].packages[] | select(.name as $name | $gone[0] | index($name) | not) | {
    type: "library", name, version,
    purl: ("pkg:deb/debian/" + .name + "@" + (.version | @uri) + "?arch=" + .architecture + "&distro=debian-13")
};
# PEP 503: one way to write a name.
def python: $python[0][] | (.name | ascii_downcase | gsub("[-_.]+"; "-")) as $plain
    | select($plain != "hairpin-ips")
    | {type: "library", name: $plain, version, purl: ("pkg:pypi/" + $plain + "@" + (.version | @uri))};

([debian, python] | unique_by(.purl) | map(. + {"bom-ref": .purl})) as $parts
| ("hairpin-image@" + $version) as $self
| {
    bomFormat: "CycloneDX", specVersion: "1.6", version: 1,
    metadata: {
        timestamp: ($epoch | todate),
        component: {
            type: "operating-system", name: "hairpin", version: $version, "bom-ref": $self,
            properties: [{name: "hairpin:commit", value: $commit}]
        }
    },
    components: $parts,
    dependencies: [{ref: $self, dependsOn: [$parts[] | ."bom-ref"]}]
}
