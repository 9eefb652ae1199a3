module "rights" {
  source = "../rights"
}

locals {
  # An object that is written anew is deleted first, in Google's words: to write is to be able to delete.
  permissions = {
    list   = ["storage.objects.list"]
    read   = ["storage.objects.get"]
    write  = ["storage.objects.create", "storage.objects.delete"]
    delete = ["storage.objects.delete"]
  }
  # "identity right" -> the prefixes it reaches
  grants = merge([
    for identity, rights in module.rights.rights : {
      for right in keys(local.permissions) : "${identity} ${right}" => {
        identity = identity
        right    = right
        prefixes = [for prefix, granted in rights : prefix if contains(granted, right)]
      } if anytrue([for granted in values(rights) : contains(granted, right)])
    }
  ]...)
}

resource "google_service_account" "part" {
  for_each     = module.rights.rights
  project      = var.project
  account_id   = "${var.name}-${each.key}"
  display_name = "${var.name}: ${each.key} in Kubernetes"
  depends_on   = [google_project_service.needed]
}

resource "google_service_account_iam_member" "part" {
  for_each           = google_service_account.part
  service_account_id = each.value.name
  role               = "roles/iam.workloadIdentityUser"
  member             = "serviceAccount:${google_container_cluster.main.workload_identity_config[0].workload_pool}[neuroloop/${each.key}]"
}

resource "google_project_iam_custom_role" "right" {
  for_each    = local.permissions
  project     = var.project
  role_id     = "${replace(var.name, "-", "_")}_store_${each.key}"
  title       = "${var.name}: ${each.key} objects"
  permissions = each.value
}

resource "google_storage_bucket_iam_member" "part" {
  for_each = local.grants
  bucket   = google_storage_bucket.store.name
  role     = google_project_iam_custom_role.right[each.value.right].id
  member   = google_service_account.part[each.value.identity].member
  condition {
    title       = "${each.value.identity}_${each.value.right}"
    description = "Only below ${join(", ", each.value.prefixes)}"
    expression = join(" || ", [
      for prefix in each.value.prefixes : each.value.right == "list"
      ? "api.getAttribute('storage.googleapis.com/objectListPrefix', '').startsWith('${prefix}')"
      : "resource.name.startsWith('projects/_/buckets/${var.bucket}/objects/${prefix}')"
    ])
  }
}
