output "store_url" {
  description = "NEUROLOOP_STORE_URL; AZURE_STORAGE_ACCOUNT_NAME is `account`."
  value       = "az://${azurerm_storage_container.store.name}"
}

output "account" {
  description = "AZURE_STORAGE_ACCOUNT_NAME."
  value       = azurerm_storage_account.store.name
}

output "database_host" {
  description = "Address of PostgreSQL, for deploy/kubernetes/make-secrets."
  value       = azurerm_postgresql_flexible_server.main.fqdn
}

output "registry" {
  description = "Where the images go; for the overlay's `images`."
  value       = azurerm_container_registry.images.login_server
}

output "identities" {
  description = "Service account in Kubernetes -> client id in Azure, for the overlay's identities.yaml."
  value       = { for name, identity in azurerm_user_assigned_identity.part : name => identity.client_id }
}

output "cluster" {
  description = "Name of the cluster: az aks get-credentials."
  value       = azurerm_kubernetes_cluster.main.name
}

output "backups_url" {
  description = "BACKUP_TO of the overlay's settings.env: where the nightly backups go."
  value       = "az://${azurerm_storage_container.backups.name}"
}
