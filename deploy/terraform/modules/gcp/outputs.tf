output "store_url" {
  description = "NEUROLOOP_STORE_URL."
  value       = google_storage_bucket.store.url
}

output "database_host" {
  description = "Address of PostgreSQL, for deploy/kubernetes/make-secrets."
  value       = google_sql_database_instance.main.private_ip_address
}

output "registry" {
  description = "Where the images go; for the overlay's `images`."
  value       = "${var.region}-docker.pkg.dev/${var.project}/${google_artifact_registry_repository.images.repository_id}"
}

output "identities" {
  description = "Service account in Kubernetes -> in Google Cloud, for the overlay's identities.yaml."
  value       = { for name, account in google_service_account.part : name => account.email }
}

output "cluster" {
  description = "Name of the cluster: gcloud container clusters get-credentials."
  value       = google_container_cluster.main.name
}

output "node_pools" {
  description = "Pools of nodes."
  value       = concat([google_container_node_pool.main.name], google_container_node_pool.gpu[*].name)
}

output "backups_url" {
  description = "BACKUP_TO of the overlay's settings.env: where the nightly backups go."
  value       = google_storage_bucket.backups.url
}
